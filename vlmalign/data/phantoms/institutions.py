"""Four invented institutions: each has its own look, its own mix of patients and its own labelling convention.

The conventions differ as those of the real data sets do, so a model trained on one and scored on another meets
the same case under other labels:

- **mimic-like** names only the specific finding; Lung Opacity is kept for haze that nothing explains; part of the
  labels is uncertain or blank; No Finding may stand beside Support Devices (the labeller's rule).
- **chexpert-like** applies the hierarchy (a specific opacity implies Lung Opacity, Cardiomegaly implies Enlarged
  Cardiomediastinum), calls the heart large from a ratio of 0.50, and No Finding excludes Support Devices.
- **nih-like** speaks the NIH names: a lesion is a Nodule or a Mass by its radius, haze is Infiltration, and it has
  no name for devices, fractures or a wide mediastinum.
- **base** is a fourth place, for pretraining: CheXpert names, half the hierarchy, a threshold of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from vlmalign.data.phantoms.cases import PREVALENCE, Case, Finding
from vlmalign.data.phantoms.looks import Look
from vlmalign.data.sources.schema import CHEXPERT, NIH14, LabelSchema

#: A lesion of this radius (film units) or more is a mass.
MASS_RADIUS = 0.115
#: A mediastinum of this share of the chest or more is wide.
WIDE_MEDIASTINUM = 0.32

_CHEXPERT_NAMES = {
    "opacity": "Lung Opacity",
    "lesion": "Lung Lesion",
    "mass": "Lung Lesion",
    "edema": "Edema",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "atelectasis": "Atelectasis",
    "pneumothorax": "Pneumothorax",
    "effusion": "Pleural Effusion",
    "rind": "Pleural Other",
    "fracture": "Fracture",
    "device": "Support Devices",
    "cardiomegaly": "Cardiomegaly",
    "mediastinum": "Enlarged Cardiomediastinum",
}

_NIH_NAMES = {
    "opacity": "Infiltration",
    "lesion": "Nodule",
    "mass": "Mass",
    "edema": "Edema",
    "consolidation": "Consolidation",
    "pneumonia": "Pneumonia",
    "atelectasis": "Atelectasis",
    "pneumothorax": "Pneumothorax",
    "effusion": "Effusion",
    "rind": "Pleural_Thickening",
    "emphysema": "Emphysema",
    "fibrosis": "Fibrosis",
    "hernia": "Hernia",
    "cardiomegaly": "Cardiomegaly",
}

_HIERARCHY = {
    "Cardiomegaly": "Enlarged Cardiomediastinum",
    "Edema": "Lung Opacity",
    "Consolidation": "Lung Opacity",
    "Pneumonia": "Lung Opacity",
    "Atelectasis": "Lung Opacity",
    "Lung Lesion": "Lung Opacity",
}


@dataclass(frozen=True)
class Convention:
    """How an institution turns what is on a film into labels."""

    schema: LabelSchema
    names: Mapping[str, str]  #: finding -> label; a finding that is not listed has no label here
    large_heart: float  #: cardiothoracic ratio from which the heart is called large
    implies: Mapping[str, str] = field(default_factory=dict)  #: label -> its parent, also positive
    normal_beside: tuple[str, ...] = ()  #: labels that do not take No Finding away
    uncertain: float = 0.0  #: chance that a positive label is written -1
    mentioned: float = 1.0  #: chance that an absent label is written 0 rather than left blank

    def name(self, finding: Finding) -> str | None:
        """The label of one finding, or None where the convention has no word for it."""
        kind = "mass" if finding.kind == "lesion" and finding.size >= MASS_RADIUS else finding.kind
        return self.names.get(kind)

    def positives(self, case: Case) -> tuple[str, ...]:
        """The labels of a case, in schema order, without any doubt."""
        found = {self.name(finding) for finding in case.findings} - {None}
        if case.heart >= self.large_heart:
            found.add(self.names["cardiomegaly"])
        if case.mediastinum >= WIDE_MEDIASTINUM and "mediastinum" in self.names:
            found.add(self.names["mediastinum"])
        found |= {self.implies[label] for label in found if label in self.implies}
        if not found - set(self.normal_beside):
            found.add(self.schema.normal)
        return self.schema.ordered(found)

    def labels(self, case: Case, rng: np.random.Generator | None = None) -> dict[str, float | None]:
        """Every label of the schema with 1 (positive), 0 (absent), -1 (uncertain) or None (not mentioned).

        Without `rng` positives are 1 and the rest 0; with it doubt and silence are drawn at the convention's rates.
        No Finding is never uncertain, and is 1 or blank where labels may be blank.
        """
        positive = set(self.positives(case))
        values: dict[str, float | None] = {}
        for label in self.schema.labels:
            value: float | None = 1.0 if label in positive else 0.0
            if rng is not None:
                draw = rng.random()
                if label == self.schema.normal:
                    value = 1.0 if label in positive else (None if self.mentioned < 1 else 0.0)
                elif label in positive:
                    value = -1.0 if draw < self.uncertain else 1.0
                else:
                    value = 0.0 if draw < self.mentioned else None
            values[label] = value
        return values


@dataclass(frozen=True)
class Institution:
    """A place that takes films: its look, its labelling convention, and how often it sees what."""

    name: str
    look: Look
    convention: Convention
    prevalence: Mapping[str, float]


def _mix(**changes: float) -> Mapping[str, float]:
    return {**PREVALENCE, **changes}


MIMIC_LIKE = Institution(
    "mimic-like",
    Look(contrast=1.0, noise=0.025, blur=1, border=0.03, marker="L"),
    Convention(
        CHEXPERT,
        _CHEXPERT_NAMES,
        large_heart=0.55,
        normal_beside=("Support Devices",),
        uncertain=0.04,
        mentioned=0.12,
    ),
    PREVALENCE,
)

#: The mix follows the CheXpert expert test labels (500 studies), with its rarest findings raised a little.
CHEXPERT_LIKE = Institution(
    "chexpert-like",
    Look(contrast=1.18, gamma=1.15, noise=0.015, vignette=0.25, border=0.06, marker="AP", marker_left=True),
    Convention(CHEXPERT, _CHEXPERT_NAMES, large_heart=0.50, implies=_HIERARCHY),
    _mix(
        normal=0.06, cardiomegaly=0.22, borderline_heart=0.10, mediastinum=0.20, opacity=0.20, lesion=0.025,
        edema=0.15, consolidation=0.06, pneumonia=0.03, atelectasis=0.28, pneumothorax=0.03, effusion=0.21,
        rind=0.012, fracture=0.015, device=0.45,
    ),
)  # fmt: skip

#: The mix follows the positives of the ChestX-ray14 table (112,120 films).
NIH_LIKE = Institution(
    "nih-like",
    Look(contrast=0.88, brightness=0.05, gamma=0.85, noise=0.03, blur=2, border=0.0, marker="R", marker_left=True, scale=0.95),
    Convention(NIH14, _NIH_NAMES, large_heart=0.55),
    _mix(
        normal=0.35, cardiomegaly=0.025, borderline_heart=0.02, mediastinum=0.01, opacity=0.177, lesion=0.10,
        edema=0.021, consolidation=0.042, pneumonia=0.013, atelectasis=0.103, pneumothorax=0.047, effusion=0.119,
        rind=0.030, fracture=0.005, device=0.15, emphysema=0.022, fibrosis=0.015, hernia=0.002,
    ),
)  # fmt: skip

BASE = Institution(
    "base",
    Look(contrast=1.08, brightness=-0.03, noise=0.02, vignette=0.1, border=0.02, border_tone=0.9, scale=1.03),
    Convention(
        CHEXPERT,
        _CHEXPERT_NAMES,
        large_heart=0.52,
        implies={"Consolidation": "Lung Opacity", "Pneumonia": "Lung Opacity"},
    ),
    PREVALENCE,
)

INSTITUTIONS = {place.name: place for place in (MIMIC_LIKE, CHEXPERT_LIKE, NIH_LIKE, BASE)}
