"""The boxes of NIH ChestX-ray14, `BBox_List_2017.csv`: where eight findings stand on 880 films, as drawn by a radiologist.

`Image Index,Finding Label,Bbox [x,y,w,h],,,`: the commas of the third name cut it into four columns, of which the last
three have none. Pixels are those of the release's films of 1,024 x 1,024. Infiltration is written "Infiltrate" there.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vlmalign.data.sources.schema import NIH14, unknown_label
from vlmalign.quoting import quoted

BOXES = "BBox_List_2017.csv"
HEADER = ("Image Index", "Finding Label", "Bbox [x", "y", "w", "h]")
#: pixels per side of the films that boxes were drawn on
SIDE = 1024
#: the labels that boxes were drawn for
BOXED = (
    "Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax",
)  # fmt: skip
#: the list's names that are not those of the label table
OTHER_NAMES = {"Infiltrate": "Infiltration"}


class FindingBox(NamedTuple):
    """Where a finding stands, in shares of the film's width and height."""

    id: str  #: image index
    label: str  #: as the label table has it
    left: float
    top: float
    width: float
    height: float


def read_boxes(path: Path) -> list[FindingBox]:
    """The boxes of a list, plain or .gz, in its order.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: naming line and column of what is no box on a film.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except FileNotFoundError:
        raise FileNotFoundError(f"no list of boxes {path}; give the path of the release's {BOXES}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read the boxes in {path}: {error}") from error
    found = tuple(rows[0]) if rows else ()
    if [name.strip() for name in found[:3]] != [*HEADER[:3]] or len(found) < 6:
        raise ValueError(f"{path}, line 1: expected the columns {', '.join(HEADER)}, found {quoted(', '.join(found))}")
    return [_box(row, f"{path}, line {number}") for number, row in enumerate(rows[1:], start=2) if row]


def write_boxes(path: Path, boxes: Iterable[FindingBox]) -> None:
    """A list in the release's format."""
    back = {name: other for other, name in OTHER_NAMES.items()}
    lines = [
        f"{box.id},{back.get(box.label, box.label)},{','.join(repr(float(SIDE * value)) for value in box[2:])},,,"
        for box in boxes
    ]
    path.write_text("\n".join([f"{','.join(HEADER)},,,", *lines]) + "\n", encoding="utf-8")


def _box(row: list[str], where: str) -> FindingBox:
    if len(row) < 6:
        raise ValueError(f"{where}: expected 6 values or more, found {len(row)}; restore the file")
    id, label = row[0], OTHER_NAMES.get(row[1], row[1])
    if not id:
        raise ValueError(f"{where}, column {HEADER[0]!r}: expected an image index, found nothing; restore the file")
    if label not in NIH14.labels:
        raise ValueError(unknown_label(label, NIH14.labels, f"{where}, column {HEADER[1]!r}"))
    left, top, width, height = (
        _number(text, f"{where}, column {name!r}") for text, name in zip(row[2:6], ("x", "y", "w", "h"), strict=True)
    )
    for start, size, name in ((left, width, "x + w"), (top, height, "y + h")):
        if size <= 0 or start < 0 or start + size > SIDE + 1e-6:  # but for what rounding adds
            raise ValueError(
                f"{where}, column {name!r}: expected a box within {SIDE} px, found {start:g} to {start + size:g}; pixels are "
                "those of the release's own films"
            )
    return FindingBox(id, label, left / SIDE, top / SIDE, width / SIDE, height / SIDE)


def _number(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: expected a number of pixels, found {quoted(text)}; restore the file")
    return value
