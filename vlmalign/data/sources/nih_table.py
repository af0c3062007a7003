"""The label table of NIH ChestX-ray14, readable without any image.

One row per image, its findings joined by `|`; the commas inside the bracketed column names split those names in
two, so the header parses as eleven names.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from vlmalign.data.sources.schema import NIH14, unknown_label
from vlmalign.data.sources.tables import read_table

TABLE = "Data_Entry_2017_v2020.csv"
#: as the release of 2017 and its copies call it
OLDER_TABLE = "Data_Entry_2017.csv"
#: As parsed: the two bracketed names come out in two parts each.
COLUMNS = (
    "Image Index", "Finding Labels", "Follow-up #", "Patient ID", "Patient Age", "Patient Gender", "View Position",
    "OriginalImage[Width", "Height]", "OriginalImagePixelSpacing[x", "y]",
)  # fmt: skip


@dataclass(frozen=True)
class NihTable:
    """The label table alone; no image is needed."""

    path: Path
    frame: pd.DataFrame  #: as read, every value text
    ids: np.ndarray  #: object array of str [films]: image index, such as 00000001_000.png
    patients: np.ndarray  #: object array of str [films]
    labels: np.ndarray  #: bool [films, 15], in the order of NIH14

    def __len__(self) -> int:
        return len(self.ids)


def read_nih_table(path: str | Path) -> NihTable:
    """`Data_Entry_2017_v2020.csv`, plain or .gz; ValueError for missing columns or unknown findings."""
    path = Path(path)
    frame = read_table(path, COLUMNS[:7])
    labels = finding_matrix(frame["Finding Labels"], path)
    return NihTable(path, frame, frame["Image Index"].to_numpy(object), frame["Patient ID"].to_numpy(object), labels)


def finding_matrix(findings: pd.Series, table: Path) -> np.ndarray:
    """`|`-joined findings as bool [rows, 15]; ValueError naming file, row and the nearest known label."""
    codes, texts = pd.factorize(findings)
    patterns = np.zeros((len(texts), len(NIH14)), bool)
    for i, text in enumerate(texts):
        for label in text.split("|"):
            if label not in NIH14.labels:
                where = f"{table}, row {int(np.argmax(codes == i)) + 2}, column {findings.name!r}"
                raise ValueError(unknown_label(label, NIH14.labels, where))
            patterns[i, NIH14.labels.index(label)] = True
    return patterns[codes]
