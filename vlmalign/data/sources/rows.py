"""Rows of the user's files as a source: conversations, preferences, prompts, questions, records (`layouts`).

    kind: rows
    path: conversations.jsonl      # or a Parquet file, or a folder saved by Hugging Face `datasets`
    images: scans                  # folder that image paths start from; without: the file's own folder

Every row is checked when the source is opened, images excepted that only decoding can judge. Images that a table holds
as bytes are written to `cache`, a folder of the run, when their row is asked for (`stored_images`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import field_validator

from vlmalign.config import FREE, Config
from vlmalign.data.films.files import BadImage
from vlmalign.data.sources.layouts import arranged, layout_of
from vlmalign.data.sources.row_files import RowFile, open_rows
from vlmalign.data.sources.settings import Place
from vlmalign.data.sources.stored_images import StoredImages
from vlmalign.quoting import MOST_OF_LINE, shown
from vlmalign.types import Example

ENDINGS = (".jsonl", ".ndjson", ".json", ".parquet")


class Rows:
    """`len(rows)` rows of one layout; `rows[i]` is an `Example` whose `meta` is the row.

    Its id is file and line, its patient the column `patient` where there is one, else the id; `image` is that of a
    record. `skipped` lists, with `on_bad="skip"`, the rows that cannot be used, as {"id", "path", "reason"}.
    """

    def __init__(self, file: RowFile, images: StoredImages, *, on_bad: str = "error"):
        """Raises ValueError (BadImage for an image) naming file and line, or when no row is left."""
        self.files, self.skipped = file.files, []
        self._file, self._images = file, images
        kept, ids, patients = [], [], []
        self.layout = ""
        for i in range(len(file)):
            try:
                row = file[i]
                self.layout = self.layout or layout_of(row)
                found = arranged(row, self.layout, images.check)
                patient = _patient(found, file.name(i))
            except (ValueError, FileNotFoundError) as error:
                why = shown(error, MOST_OF_LINE)
                if on_bad == "error":
                    kinds = (BadImage, FileNotFoundError, ValueError)
                    kind = next(kind for kind in kinds if isinstance(error, kind))
                    raise kind(f"{file.name(i)}: {why}; correct the row, or set on_bad to skip") from error
                self.skipped.append({"id": file.name(i), "path": str(file.files[0]), "reason": why})
                continue
            kept.append(i)
            ids.append(file.name(i))
            patients.append(patient)
        if not kept:
            why = f": {len(self.skipped)} were skipped, the first: {self.skipped[0]['reason']}" if self.skipped else ""
            raise ValueError(f"{file.files[0]} has no row to use{why}")
        self._kept = np.array(kept)
        self._ids, self._patients = np.array(ids, object), np.array(patients, object)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i}: there are {len(self)} rows")
        row = arranged(self._file[int(self._kept[i])], self.layout, self._images.locate)
        image = row.get("image") if self.layout == "records" else None
        return Example(self._ids[i], self._patients[i], None if image is None else Path(image), (), row)

    def ids(self) -> np.ndarray:
        """File and line of each row: object array of str [rows]."""
        return self._ids.copy()

    def patients(self) -> np.ndarray:
        """Patient of each row: object array of str [rows]."""
        return self._patients.copy()


def read_row(path: Path, line: int, images: StoredImages) -> Example:
    """The row at a line of a file (the first is 1), as `Rows` gives it.

    Raises:
        ValueError, FileNotFoundError: naming file and line, when there is no such row or it cannot be used.
    """
    file = open_rows(path)
    # Lines that are empty hold no row, and count.
    index = next((i for i in range(min(line, len(file)) - 1, -1, -1) if file.name(i) == f"{path.name}:{line}"), None)
    if index is None:
        raise ValueError(
            f"{path}: there is no row {line}; it has {len(file)} rows, the last is {file.name(len(file) - 1)}"
            if len(file)
            else f"{path} has no rows"
        )
    name = file.name(index)
    try:
        row = file[index]
        found = arranged(row, layout_of(row), images.locate)
        patient = _patient(found, name)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"{name}: {shown(error, MOST_OF_LINE)}") from error
    return Example(name, patient, None, (), found)


class RowSource(Config):
    """A file of rows."""

    kind: Literal["rows"]
    path: Annotated[Path, FREE]  #: .jsonl or .parquet, or a folder that `save_to_disk` wrote
    split: str | None = None  #: of a saved DatasetDict
    images: Annotated[Path | None, FREE] = None  #: folder that image paths start from and may not leave
    on_bad: Literal["error", "skip"] = "error"  #: a row that cannot be used stops the run, or is left out and listed
    cache: Annotated[Path | None, FREE] = (
        None  #: for images that the table holds as bytes; None: sources/images of the run
    )

    @field_validator("path")
    @classmethod
    def _a_known_format(cls, path: Path) -> Path:
        if path.suffix and path.suffix.lower() not in ENDINGS:
            raise ValueError(f"rows are read from {', '.join(ENDINGS)} or a saved folder; found {path.name!r}")
        return path

    @property
    def folder(self) -> Path:
        """Where its images lie, as the config says it."""
        return self.path.parent if self.images is None else self.images

    def open(self, place: Place) -> Rows:
        """The rows, each checked.

        Raises:
            FileNotFoundError: for a file or an image that is not there.
            ValueError: naming file and line.
        """
        path = place(str(self.path))
        file = open_rows(path, self.split)
        root = place(str(self.folder))
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root} for the images of {path}")
        cache = place(str(self.cache or "{run}/sources/images"))
        return Rows(file, StoredImages(root, cache), on_bad=self.on_bad)


def _patient(row: dict, id: str) -> str:
    patient = row.get("patient")
    if patient is None:
        return id
    if isinstance(patient, str | int) and not isinstance(patient, bool) and str(patient).strip():
        return str(patient)
    raise ValueError(f'"patient" must be text or a whole number, found {type(patient).__name__}')
