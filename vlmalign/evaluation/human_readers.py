"""Human readers of the public CheXpert test labels as a yardstick: what three radiologists and the report labeler score.

The release of the test set's labels holds, per study, the truth (`groundtruth.csv`: the majority of five radiologists), three
benchmark radiologists who are none of the five (`radiologists/benchmark/`), and what the labeler read in the
reports (`labeler/`). Uncertain counts as absent, as everywhere. A study is a case: models answer single films of it, so
their n differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmalign.data.sources.chexpert import read_study_table
from vlmalign.data.sources.schema import CHEXPERT, CHEXPERT9
from vlmalign.data.sources.tables import label_values, positives
from vlmalign.evaluation.results import Results, evaluate_predictions
from vlmalign.shapes import Bool

TRUTH, BENCHMARK, LABELER = "groundtruth.csv", "radiologists/benchmark", "labeler/chexpert_labels.csv"
SUBSETS = {
    "all 14": CHEXPERT.labels,
    "shared 9": tuple(label for label in CHEXPERT.labels if label in CHEXPERT9.labels),
}


class Readings(NamedTuple):
    """What is true of each study, and what each reader says; labels in CheXpert's order."""

    studies: tuple[str, ...]
    patients: tuple[str, ...]
    truth: Bool[np.ndarray, "study label"]
    readers: Mapping[str, Bool[np.ndarray, "study label"]]  #: by name


def read_readings(folder: str | Path) -> Readings:
    """The truth and every reader: each radiologist alone, their majority, the labeler, and "all positive".

    Columns are read by name: two of them stand in another order in the readers' files.

    Raises:
        FileNotFoundError: naming the file that is missing.
        ValueError: for a table that is not as released, or has other studies than the truth.
    """
    folder = Path(folder)
    files = sorted((folder / BENCHMARK).glob("*.csv"))
    if not files:
        raise FileNotFoundError(
            f"no reader's table in {folder / BENCHMARK}; expected the folder of the released labels"
        )
    truth = read_study_table(folder / TRUTH)
    studies = tuple(truth["path"])
    alone = {f"radiologist {path.stem}": _matrix(path, studies) for path in files}
    votes = np.sum(list(alone.values()), axis=0)
    return Readings(
        studies,
        tuple(truth["patient"]),
        _matrix(folder / TRUTH, studies),
        {
            **alone,
            f"majority of {len(alone)} radiologists": 2 * votes > len(alone),
            "report labeler": _matrix(folder / LABELER, studies),
            "all positive": np.ones((len(studies), len(CHEXPERT)), bool),
        },
    )


def score_readers(readings: Readings, *, draws: int = 1000, seed: int = 0) -> dict[str, Results]:
    """Every reader's scores over all 14 labels and over the nine that NIH shares, with patient-level intervals."""
    return {
        name: evaluate_predictions(_rows(readings, said), CHEXPERT.labels, subsets=SUBSETS, draws=draws, seed=seed)
        for name, said in readings.readers.items()
    }


def _rows(readings: Readings, said: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"id": study, "patient": patient, "truth": _names(true), "predicted": _names(own), "valid": True}
        for study, patient, true, own in zip(readings.studies, readings.patients, readings.truth, said, strict=True)
    ]


def _names(row: np.ndarray) -> list[str]:
    return [label for label, on in zip(CHEXPERT.labels, row, strict=True) if on]


def _matrix(path: Path, studies: tuple[str, ...]) -> Bool[np.ndarray, "study label"]:
    """A table's labels in the order of `studies`."""
    frame = read_study_table(path)
    found = {study: place for place, study in enumerate(frame["path"])}
    if len(found) != len(frame) or set(found) != set(studies):
        other = sorted(set(found) ^ set(studies)) or [
            study for study in studies if list(frame["path"]).count(study) > 1
        ]
        raise ValueError(
            f"{path}: expected the {len(studies)} studies of {TRUTH}, each once; the first to differ: {other[0]}"
        )
    labels = positives(label_values(frame, path, CHEXPERT.labels))
    return labels[[found[study] for study in studies]]
