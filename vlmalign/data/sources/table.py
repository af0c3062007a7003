"""The user's own films: a table (CSV, Parquet or JSON Lines) and a folder of images, with any names of labels.

    kind: table
    path: films.csv
    images: scans                  # folder that the image column's paths start from
    image: file
    patient: patient_id            # without: every film counts as a patient of its own
    labels: {column: findings, separator: "|", normal: Normal}      # or one column per label: [Veil, Ring]

Splits and intervals are by patient, so say which column holds it where there is one.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import BeforeValidator, Field, field_validator, model_validator

from vlmalign.config import FREE, Config
from vlmalign.data.sources.films import Films
from vlmalign.data.sources.padchest import OPEN_MAPS
from vlmalign.data.sources.schema import LabelSchema, renaming, unknown_label
from vlmalign.data.sources.settings import FilmSource, Place, Uncertain
from vlmalign.data.sources.tables import LABEL_VALUES, ignored, label_values, positives
from vlmalign.data.sources.text_table import check_ending, read_text_table
from vlmalign.quoting import quoted

#: texts that a label's column may hold, and their value; blank means not mentioned
VALUES = {**LABEL_VALUES, **dict.fromkeys(("true", "True", "TRUE"), 1.0)}
VALUES |= dict.fromkeys(("false", "False", "FALSE"), 0.0)

#: lists are made tuples here: pydantic's JSON mode does so itself, but not behind a validator such as `_short_form`
_tuple = BeforeValidator(lambda given: tuple(given) if isinstance(given, list) else given)
Names = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _tuple, Field(min_length=1)]


class Labels(Config):
    """Where a film's labels stand: in a column each (`columns`), or in one column as their names (`column`)."""

    columns: Names | None = None  #: each holds 1, 0, -1, true, false or blank, and names a label
    values: dict[str, Literal[1, 0, -1]] = Field(
        default_factory=dict
    )  #: further texts in `columns`: {"yes": 1, "no": 0}
    uncertain: Uncertain = "negative"  #: what -1 counts as; also "positive-only", "u-zeros", "u-ones", "u-ignore"
    column: str | None = None  #: holds names, joined by the separator; blank: none
    separator: Annotated[str, Field(min_length=1)] | None = None  #: None: one name a film
    lists: bool = False  #: `column` holds lists as Python or JSON write them: ['a', 'b']
    #: names in `column` that say that a film's labels are not known: it is left out, and listed
    unlabelled: Names | None = None
    blank: Literal["none", "unlabelled"] = "none"  #: what an empty cell of `column` says: no label, or not known
    names: Names | None = None  #: the names that `column` may hold, in their order; None: those found, sorted
    normal: str | None = None  #: which label says that nothing was found

    @model_validator(mode="after")
    def _one_form(self) -> Labels:
        if (self.columns is None) == (self.column is None):
            found = "neither" if self.columns is None else "both"
            raise ValueError(f"give either columns (one for each label) or column (one with the names), found {found}")
        for name in ("separator", "names", "lists", "unlabelled") if self.column is None else ("values",):
            if getattr(self, name):
                other = "column, which holds names" if self.column is None else "columns, which hold a value each"
                raise ValueError(f"{name} belongs to {other}; leave it out")
        if self.lists and self.separator:
            raise ValueError("lists of names need no separator; leave it out")
        if known := self.columns or self.names:
            LabelSchema("labels", known, self.normal)
        return self


class TableFilms(FilmSource):
    """A table of films; every column that is not named here becomes text in `meta`, under its own name."""

    kind: Literal["table"]
    path: Annotated[Path, FREE]  #: .csv, .csv.gz, .parquet or .jsonl
    images: Annotated[Path | None, FREE] = (
        None  #: folder that image paths start from and may not leave; None: the table's
    )
    image: str  #: column with the path of the image
    subfolder: str | None = None  #: column with the folder that this path starts from, below `images`
    suffix: str = ""  #: added to each path, such as ".png"
    labels: Labels
    id: str | None = None  #: column; None: the image's path
    patient: str | None = None  #: column; None: the id, so every film is a patient of its own
    view: str | None = None  #: column
    views: Names | None = None  #: which values of `view` are taken; None: all
    sex: str | None = None  #: column, as is `age`: what subgroups of scores are made of
    age: str | None = None
    split: str | None = None  #: column
    splits: Names | None = None  #: which values of `split` are taken; None: all

    @field_validator("path")
    @classmethod
    def _a_known_format(cls, path: Path) -> Path:
        check_ending(path)
        return path

    @field_validator("labels", mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        return {"columns": given} if isinstance(given, list | tuple) else given

    @model_validator(mode="after")
    def _consistent(self) -> TableFilms:
        for chosen, column in (("views", "view"), ("splits", "split")):
            if getattr(self, chosen) and getattr(self, column) is None:
                raise ValueError(f"{chosen} needs to know in which column they stand: set {column}")
        if isinstance(self.label_map, str) and self.label_map not in OPEN_MAPS:
            raise ValueError(
                f"label_map of a table is {{their label: our label}} or one of {', '.join(OPEN_MAPS)}; found {self.label_map!r}"
            )
        if isinstance(self.label_map, dict) and (known := self.labels.columns or self.labels.names):
            renaming(LabelSchema("the table", known, self.labels.normal), self.label_map)
        return self

    @property
    def folder(self) -> Path:
        """Where its films lie, as the config says it."""
        return self.path.parent if self.images is None else self.images

    def open(self, place: Place) -> Films:
        """The table's films.

        Raises:
            FileNotFoundError: for a table, folder or film that is not there.
            ValueError: naming the table, and row and column where there is one.
        """
        path, root = place(str(self.path)), place(str(self.folder))
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root} for the images of {path}")
        named = [
            self.image,
            self.subfolder,
            self.id,
            self.patient,
            self.view,
            self.sex,
            self.age,
            self.split,
            *(self.labels.columns or [self.labels.column]),
        ]
        frame, rows = read_text_table(path, list(dict.fromkeys(name for name in named if name is not None)))
        for column, taken in ((self.view, self.views), (self.split, self.splits)):
            keep = chosen(frame, column, taken, path)
            frame, rows = frame[keep], rows[keep]
        paths = filled(frame, self.image, rows, path) + self.suffix
        if self.subfolder is not None:
            paths = filled(frame, self.subfolder, rows, path) + "/" + paths
        known, skipped = _labelled(self.labels, frame, rows, paths, path)
        frame, rows, paths = frame[known], rows[known], paths[known]
        labels = read_labels(self.labels, frame, rows, path)
        ids = paths if self.id is None else filled(frame, self.id, rows, path)
        notes = (
            []
            if self.patient is not None
            else [f"{path}: no patient column is named; every film is a patient's only one"]
        )
        named_so = {"view": self.view, "sex": self.sex, "age": self.age, "split": self.split}
        renamed = {name: column for name, column in named_so.items() if column is not None}
        used = {*named, *renamed}
        films = Films(
            "table",
            labels.schema,
            root,
            table=path,
            ids=ids,
            patients=ids if self.patient is None else filled(frame, self.patient, rows, path),
            paths=paths,
            labels=labels.positive,
            rows=rows,
            meta={
                **{name: frame[name] for name in frame if name not in used},
                **{name: frame[column] for name, column in renamed.items()},
            },
            skipped=skipped,
            on_bad=self.on_bad,
            notes=notes,
            ignored=labels.ignored,
        )
        return self.finished(films, place)


def chosen(frame: pd.DataFrame, column: str | None, taken: tuple[str, ...] | None, path: Path) -> np.ndarray:
    """Which rows are taken; ValueError for a value that no row has."""
    if column is None or taken is None:
        return np.ones(len(frame), bool)
    found = list(frame[column].value_counts().index)
    if absent := [value for value in taken if value not in found]:
        listed = ", ".join(map(quoted, found[:12])) + (", ..." if len(found) > 12 else "")
        raise ValueError(f"{path}, column {column!r}: no row has {absent[0]!r}; found {listed}")
    return frame[column].isin(taken).to_numpy()


def filled(frame: pd.DataFrame, column: str, rows: np.ndarray, path: Path) -> pd.Series:
    """The texts of a column in which no cell may be blank."""
    texts = frame[column].map(lambda cell: cell.strip() if isinstance(cell, str) else "")
    if (blank := (texts == "").to_numpy()).any():
        raise ValueError(f"{path}, row {rows[int(blank.argmax())]}, column {column!r}: found nothing, expected text")
    return texts


class TableLabels(NamedTuple):
    """The labels of a table's rows."""

    positive: np.ndarray  #: bool [rows, labels]
    ignored: np.ndarray  #: bool [rows, labels]: uncertain values for which a row is left out
    schema: LabelSchema


def read_labels(labels: Labels, frame: pd.DataFrame, rows: np.ndarray, path: Path) -> TableLabels:
    """What `labels` says of a table as text, whose rows have these numbers in the file; ValueError names row and column."""
    if labels.columns is not None:
        known = {**VALUES, **{text: float(value) for text, value in labels.values.items()}}
        values = label_values(frame, path, labels.columns, known=known, rows=rows)
        schema = LabelSchema(path.name, labels.columns, labels.normal)
        return TableLabels(positives(values, labels.uncertain), ignored(values, labels.uncertain), schema)
    cells = _cells(labels, frame, rows, path)
    found = sorted({name for cell in cells for name in cell})
    names = labels.names or tuple(found)
    where = f"{path}, column {labels.column!r}"
    if not names:
        raise ValueError(f"{where}: no row has a label")
    if labels.normal is not None and labels.normal not in names:
        raise ValueError(unknown_label(labels.normal, names, f"normal: {where}"))
    matrix = np.zeros((len(cells), len(names)), bool)
    for row, cell in enumerate(cells):
        for name in cell:
            if name not in names:
                raise ValueError(unknown_label(name, names, f"{path}, row {rows[row]}, column {labels.column!r}"))
            matrix[row, names.index(name)] = True
    return TableLabels(matrix, np.zeros_like(matrix), LabelSchema(path.name, names, labels.normal))


def _labelled(
    labels: Labels, frame: pd.DataFrame, rows: np.ndarray, paths: pd.Series, path: Path
) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Which rows have labels that are known (bool), and the others, as `Films` lists what is skipped."""
    known, skipped = np.ones(len(frame), bool), []
    if labels.column is None or (labels.unlabelled is None and labels.blank == "none"):
        return known, skipped
    for place, names in enumerate(_cells(labels, frame, rows, path)):
        saying = [name for name in names if name in (labels.unlabelled or ())]
        if saying or (not names and labels.blank == "unlabelled"):
            known[place] = False
            why = f"its label {saying[0]!r} says that its labels are not known" if saying else "it has no labels"
            skipped.append({"id": paths.iloc[place], "path": paths.iloc[place], "reason": why})
    return known, skipped


def _cells(labels: Labels, frame: pd.DataFrame, rows: np.ndarray, path: Path) -> list[list[str]]:
    """The names of each row."""
    found = []
    for row, cell in zip(rows, frame[labels.column], strict=True):
        if labels.lists and isinstance(cell, str):
            try:
                cell = _list(cell)
            except ValueError as error:
                raise ValueError(f"{path}, row {row}, column {labels.column!r}: {error}") from None
        found.append(_names_of(cell, labels.separator))
    return found


def _list(text: str) -> list[Any]:
    """A list as Python or JSON write it; blank: an empty one.

    >>> _list("['normal', ' scoliosis']"), _list("")
    (['normal', ' scoliosis'], [])
    """
    if not text.strip():
        return []
    try:
        found = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        found = None
    if not isinstance(found, list):
        raise ValueError(f"expected a list of names such as ['a', 'b'], found {text[:40]!r}")
    return found


def _names_of(cell: Any, separator: str | None) -> list[str]:
    """The names in a cell: a list (JSON, Parquet), or a text that is one name or several."""
    parts = cell if isinstance(cell, list) else str(cell).split(separator) if separator else [str(cell)]
    return [name for part in parts if (name := str(part).strip())]
