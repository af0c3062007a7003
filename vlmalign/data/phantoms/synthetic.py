"""What the writers of invented data sets share: planning patients and studies, rendering films, the truth file.

Everything is derived from the seed: a study's case from (seed, study), a film's anatomy and grain from
(seed, film). So the files do not depend on the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmalign.data.phantoms.cases import SIZES, Case, Finding, draw_case
from vlmalign.data.phantoms.institutions import Institution
from vlmalign.data.phantoms.looks import Look
from vlmalign.data.phantoms.phantom import finding_boxes, render, render_lateral
from vlmalign.data.sources.schema import LabelSchema


@dataclass(frozen=True)
class Study:
    """One visit: `views` holds the ViewPosition of each film ("" = blank)."""

    split: str
    patient: int  #: counts patients from 0, over all splits
    number: int  #: counts studies from 0, over all splits
    visit: int  #: counts the patient's studies from 0
    views: tuple[str, ...]
    case: Case
    labels: Mapping[str, float | None]  #: as written: 1, 0, -1 or None for blank
    sex: str
    age: int  #: years

    @property
    def positives(self) -> tuple[str, ...]:
        return tuple(label for label, value in self.labels.items() if value == 1.0)


@dataclass(frozen=True)
class Film:
    """One file to be written."""

    path: str  #: relative to the data root; the suffix chooses JPEG or PNG
    case: Case
    lateral: bool = False


def split_counts(films: int | Mapping[str, int], shares: Mapping[str, float]) -> dict[str, int]:
    """Films per split: as given, or a total divided by `shares` (the first split takes the rest)."""
    if not isinstance(films, int):
        unknown = sorted(set(films) - set(shares))
        if unknown:
            raise ValueError(f"unknown splits {unknown}; known: {', '.join(shares)}")
        return dict(films)
    counts = {split: round(films * share) for split, share in shares.items()}
    first = next(iter(shares))
    counts[first] = films - sum(count for split, count in counts.items() if split != first)
    return counts


def plan_studies(
    counts: Mapping[str, int],
    institution: Institution,
    schema: LabelSchema,
    *,
    seed: int,
    laterals: bool,
    films_per_study: int = 2,
) -> list[Study]:
    """Studies with exactly `counts[split]` AP or PA films per split; no patient is in two splits.

    Patients have 1 to 3 studies, a fifth of the studies has a second frontal film; with `laterals` three in ten
    studies have a LATERAL film besides, and one in thirty a film whose view is blank. ValueError when no film is
    asked for, or when the institution does not label in the format's `schema`.
    """
    if institution.convention.schema != schema:
        raise ValueError(
            f"this format holds {schema.name} labels, {institution.name} gives {institution.convention.schema.name}"
        )
    if sum(counts.values()) < 1:
        raise ValueError(f"films must be at least 1, found {dict(counts)}")
    rng = np.random.default_rng([seed, 1])
    studies: list[Study] = []
    patient = 0
    for split, count in counts.items():
        left = count
        while left > 0:
            sex, age = "MF"[rng.integers(2)], int(rng.integers(18, 91))
            for visit in range(int(rng.choice([1, 2, 3], p=[0.6, 0.25, 0.15]))):
                frontal = min(left, films_per_study, 1 + int(rng.random() < 0.2))
                if not frontal:
                    break
                left -= frontal
                views = [("AP", "PA")[rng.integers(2)] for _ in range(frontal)]
                if laterals:
                    views += ["LATERAL"] * int(rng.random() < 0.3) + [""] * int(rng.random() < 1 / 30)
                own = np.random.default_rng([seed, 2, len(studies)])
                case = draw_case(own, institution.prevalence)
                labels = institution.convention.labels(case, own)
                studies.append(Study(split, patient, len(studies), visit, tuple(views), case, labels, sex, age))
            patient += 1
    return studies


def write_films(root: Path, films: Sequence[Film], look: Look, *, seed: int, size: int, workers: int = 1) -> None:
    """Renders and saves every film (size x size px, 8-bit grey). More than one worker starts fresh processes."""
    for folder in sorted({(root / film.path).parent for film in films}):
        folder.mkdir(parents=True, exist_ok=True)
    jobs = [(str(root / film.path), film, look, (seed, 3, i), size) for i, film in enumerate(films)]
    if workers <= 1:
        for job in jobs:
            _write_film(job)
        return
    # Fresh processes, not forks: the caller may hold an accelerator runtime whose threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        for _ in pool.imap_unordered(_write_film, jobs, chunksize=64):
            pass


def boxes_of(
    case: Case, institution: Institution, film: int, *, seed: int, size: int
) -> list[tuple[str, tuple[float, float, float, float]]]:
    """(label, its box: see `finding_boxes`) of the findings that have both, on the `film`-th that `write_films` writes."""
    places = finding_boxes(case, institution.look, np.random.default_rng((seed, 3, film)), size)
    names = [institution.convention.name(finding) for finding in case.findings]
    return [(name, place) for name, place in zip(names, places, strict=True) if name is not None and place is not None]


def _write_film(job: tuple[str, Film, Look, tuple[int, ...], int]) -> None:
    path, film, look, key, size = job
    rng = np.random.default_rng(key)
    pixels = render_lateral(look, rng, size) if film.lateral else render(film.case, look, rng, size)
    options = {"quality": 92} if path.endswith(".jpg") else {"compress_level": 1}
    Image.fromarray(pixels).save(path, **options)


def truth_row(id: str, study: Study, institution: Institution) -> dict[str, Any]:
    """What is on a film, in words: id, patient, institution, labels as written (positives), heart and mediastinum
    ratios, and per finding its kind, side, zone, size and the label this institution has for it (or None)."""
    convention = institution.convention
    return {
        "id": id,
        "patient": study.patient,
        "institution": institution.name,
        "labels": list(study.positives),
        "heart": round(study.case.heart, 4),
        "mediastinum": round(study.case.mediastinum, 4),
        "findings": [
            {
                "kind": finding.kind,
                "label": convention.name(finding),
                "side": finding.side,
                "zone": finding.zone,
                "size": size_word(finding),
                "style": finding.style,
            }
            for finding in study.case.findings
        ],
    }


def size_word(finding: Finding) -> str:
    """small, moderate or large: the third of its kind's range that the size falls in."""
    low, high = SIZES[finding.kind]
    share = (finding.size - low) / (high - low) if high > low else 0.5
    return ("small", "moderate", "large")[min(2, int(3 * share))]


def write_truth(root: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`truth.jsonl` in `root`, one row per frontal film."""
    with (root / "truth.jsonl").open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
