"""What is wrong with an invented chest: the latent truth that a phantom film is rendered from.

Lengths are in film units: the film spans -1..1 in x (left edge to right edge) and in y (top to bottom). As on a
real frontal film the patient's *right* side is on the left of the image. A case knows nothing of label
conventions: two institutions may describe the same case with different labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

#: Kinds of finding with a place, in drawing order (later ones are painted over earlier ones).
KINDS = (
    "emphysema", "fibrosis", "edema", "opacity", "pneumonia", "consolidation", "lesion", "atelectasis",
    "pneumothorax", "effusion", "rind", "hernia", "fracture", "device",
)  # fmt: skip

#: Sixths of the lungs, as (side, zone) -> centre (x, y) in film units.
ZONES = {
    (side, zone): ((-x if side == "right" else x + 0.04), y)
    for side in ("right", "left")
    for zone, x, y in (("upper", 0.38, -0.36), ("middle", 0.44, -0.06), ("lower", 0.48, 0.22))
}

#: Where each kind may lie; kinds that are not listed have one fixed place or none.
ALLOWED = {
    "opacity": ("upper", "middle", "lower"),
    "pneumonia": ("middle", "lower"),
    "consolidation": ("upper", "middle", "lower"),
    "lesion": ("upper", "middle", "lower"),
    "atelectasis": ("middle", "lower"),
    "pneumothorax": ("upper",),
    "effusion": ("lower",),
    "rind": ("middle",),
    "fracture": ("upper", "middle"),
}

#: Range of `Finding.size`, by kind: its meaning is given with each painter in `painters`.
SIZES = {
    "emphysema": (0.7, 1.0),
    "fibrosis": (0.7, 1.0),
    "edema": (0.35, 0.60),
    "opacity": (0.20, 0.30),
    "pneumonia": (0.16, 0.22),
    "consolidation": (0.17, 0.22),
    "lesion": (0.070, 0.170),
    "atelectasis": (0.035, 0.050),
    "pneumothorax": (0.16, 0.34),
    "effusion": (0.26, 0.56),
    "rind": (0.08, 0.13),
    "hernia": (0.13, 0.18),
    "fracture": (0.20, 0.26),
    "device": (1.0, 1.0),
}

DEVICES = ("line", "pacemaker", "tube")


@dataclass(frozen=True)
class Finding:
    """One finding: what, where and how large."""

    kind: str  #: one of KINDS
    side: str  #: "right", "left" or "both", of the patient
    zone: str  #: "upper", "middle", "lower", or "" where the kind has one place
    x: float  #: centre, film units
    y: float
    size: float  #: film units (edema, emphysema, fibrosis: strength 0..1)
    style: str = ""  #: device: line, pacemaker or tube


@dataclass(frozen=True)
class Case:
    """Latent truth of one film."""

    heart: float  #: cardiothoracic ratio: heart width over inner chest width
    mediastinum: float  #: upper mediastinal width over inner chest width
    findings: tuple[Finding, ...] = ()

    def has(self, kind: str) -> bool:
        return any(finding.kind == kind for finding in self.findings)


#: Chance of each finding. `normal` is the share of films drawn without any (devices excepted), on top of those
#: that draw none by luck; `cardiomegaly`, `borderline_heart` and `mediastinum` set the two ratios. These follow the
#: positives per training study of MIMIC-CXR-JPG; the NIH-only kinds are absent there.
PREVALENCE: Mapping[str, float] = {
    "normal": 0.16,
    "cardiomegaly": 0.171,
    "borderline_heart": 0.05,
    "mediastinum": 0.031,
    "opacity": 0.222,
    "lesion": 0.027,
    "edema": 0.115,
    "consolidation": 0.046,
    "pneumonia": 0.069,
    "atelectasis": 0.198,
    "pneumothorax": 0.041,
    "effusion": 0.232,
    "rind": 0.0085,
    "fracture": 0.0165,
    "device": 0.287,
    "emphysema": 0.0,
    "fibrosis": 0.0,
    "hernia": 0.0,
}


def draw_case(rng: np.random.Generator, prevalence: Mapping[str, float] = PREVALENCE) -> Case:
    """A case drawn with the given chances (missing names count as 0); ValueError for unknown names.

    The chances are those over all films: away from the `normal` share they are raised so that the total comes out.
    Findings keep to different sixths of the lungs while there is room, so that each stays visible.
    """
    unknown = sorted(set(prevalence) - set(PREVALENCE))
    if unknown:
        raise ValueError(f"unknown findings {unknown} in prevalence; known: {', '.join(PREVALENCE)}")
    sick_share = 1.0 - prevalence.get("normal", 0.0)
    if not 0 < sick_share <= 1:
        raise ValueError(f"prevalence of normal must be in [0, 1), found {1 - sick_share}")
    sick = rng.random() < sick_share

    # All chances are drawn at once, in the order of PREVALENCE; devices do not depend on being sick.
    draws = dict(zip(PREVALENCE, rng.random(len(PREVALENCE)).tolist(), strict=True))
    occurs = {
        name: draw < prevalence.get(name, 0.0) * (1 if name == "device" else sick / sick_share)
        for name, draw in draws.items()
    }

    heart = rng.uniform(0.40, 0.485)
    if occurs["cardiomegaly"]:
        heart = rng.uniform(0.58, 0.70)
    elif occurs["borderline_heart"]:
        heart = rng.uniform(0.515, 0.54)
    mediastinum = rng.uniform(0.38, 0.46) if occurs["mediastinum"] else rng.uniform(0.19, 0.25)

    taken: set[tuple[str, str]] = set()
    findings = []
    # Kinds with one possible zone choose first, so that they find it free.
    for kind in sorted(KINDS, key=lambda kind: len(ALLOWED.get(kind, ()))):
        if occurs[kind]:
            findings.append(_draw_finding(rng, kind, taken))
            both_sides = kind == "effusion" and rng.random() < 0.3
            if both_sides:
                findings.append(_draw_finding(rng, kind, taken))
    findings.sort(key=lambda finding: KINDS.index(finding.kind))
    return Case(heart, mediastinum, tuple(findings))


def _draw_finding(rng: np.random.Generator, kind: str, taken: set[tuple[str, str]]) -> Finding:
    low, high = SIZES[kind]
    size = float(rng.uniform(low, high))
    if kind == "device":
        style = DEVICES[rng.integers(len(DEVICES))]
        side = {"pacemaker": "left", "tube": "both"}.get(style) or ("right", "left")[rng.integers(2)]
        return Finding(kind, side, "", 0.0, 0.0, size, style)
    if kind not in ALLOWED:
        return Finding(kind, "both", "", 0.0, 0.0, size)
    places = [(side, zone) for side in ("right", "left") for zone in ALLOWED[kind]]
    free = [place for place in places if place not in taken] or places
    side, zone = free[rng.integers(len(free))]
    taken.add((side, zone))
    x, y = ZONES[side, zone]
    # A lesion or haze may lie anywhere in its sixth, the others are tied to a structure.
    reach = {"lesion": 0.11, "opacity": 0.08, "pneumonia": 0.05}.get(kind, 0.02)
    return Finding(kind, side, zone, x + float(rng.uniform(-reach, reach)), y + float(rng.uniform(-reach, reach)), size)
