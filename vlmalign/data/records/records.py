"""Records with random access: what a table, an invented clinic or MEDS events become under a declared schema.

Every cell is read when the source is opened. A record with a cell that the schema does not allow stops the run, or is left out
and counted by its reason: a field that is required and missing, a number out of range, an unknown code, an id that is there
twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlmalign.data.records.fields import AnyRecordField, CodeField, ListField
from vlmalign.data.records.summary import Summary, summarise
from vlmalign.data.sources.schema import LabelSchema
from vlmalign.data.sources.text_table import TextTable
from vlmalign.quoting import quoted, shown
from vlmalign.types import Example

#: the key of an example's `meta` that holds the record in words
SUMMARY = "summary"
#: reasons that a note lists
SHOWN = 8


class Records:
    """`len(records)` records; `records[i]` is an `Example` whose `meta` holds every field's value, and `summary`.

    Labels are the decisions in words, "strategy: ICSI": what balanced sets and coverage count. Records that tell the same of
    the fields in the summary are *twins*; a model cannot tell them apart.
    """

    def __init__(
        self,
        path: Path,
        fields: Mapping[str, AnyRecordField],
        summary: Summary,
        read: Read,
        *,
        labels: Sequence[str],
        files: Sequence[Path],
        notes: Sequence[str] = (),
    ):
        """`labels`: the decisions, codes or lists, whose words are labels."""
        self.fields, self.summary, self.files = fields, summary, tuple(files)
        self.skipped = [{"id": id, "path": str(path), "reason": why} for id, why in read.skipped.items()]
        self.notes = [*notes, *_counted(read)]
        if not len(read.ids):
            raise ValueError(f"{path}: no record is left; {'; '.join(self.notes) or 'the table has no rows'}")
        self._ids, self._patients, self._values = read.ids, read.patients, read.values
        self._told, self._lines = summary.told(fields), summary.lines(fields)
        names = {name: fields[name].words or _found(self._values[name]) for name in labels}
        self._labels = [(name, word) for name, words in names.items() for word in words]
        self.schema = LabelSchema(path.name, tuple(f"{name}: {word}" for name, word in self._labels), normal=None)

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"record {i}: there are {len(self)} records")
        values = {name: column[i] for name, column in self._values.items()}
        text = summarise(self._lines, self.fields, values, self.summary.missing)
        return Example(self._ids[i], self._patients[i], None, (), {**values, SUMMARY: text})

    def ids(self) -> np.ndarray:
        """Id of each record: object array of str [records]."""
        return self._ids.copy()

    def patients(self) -> np.ndarray:
        """Patient of each record: object array of str [records]."""
        return self._patients.copy()

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields' names."""
        return tuple(self._values)

    @property
    def told(self) -> list[str]:
        """The fields that the summary tells."""
        return list(self._told)

    def column(self, name: str) -> np.ndarray:
        """A field of each record: object array [records], None where nothing is known."""
        return self._values[name].copy() if name in self._values else np.full(len(self), None, object)

    def label_matrix(self) -> np.ndarray:
        """bool [records, labels] in schema order."""
        matrix = np.zeros((len(self), len(self._labels)), bool)
        for place, (name, word) in enumerate(self._labels):
            matrix[:, place] = [
                word in value if isinstance(value, list) else word == value for value in self._values[name]
            ]
        return matrix

    def twins(self) -> np.ndarray:
        """SHA-256 of what the summary's fields hold, the same for twins: object array of str [records]."""
        told = zip(*(self._values[name] for name in self._told), strict=True)
        return np.array([hashlib.sha256(json.dumps(values).encode()).hexdigest() for values in told], object)


class Read(NamedTuple):
    """The rows of a table that can be used, and why the others cannot."""

    ids: np.ndarray  #: object [records]
    patients: np.ndarray  #: object [records]
    values: dict[str, np.ndarray]  #: field -> object [records]
    skipped: dict[str, str]  #: file and row -> reason


def read_records(
    table: TextTable,
    path: Path,
    fields: Mapping[str, AnyRecordField],
    *,
    id: str | None,
    patient: str | None,
    missing: Sequence[str],
    on_bad: str,
) -> Read:
    """Every row of a table read by the schema.

    Args:
        id: column; None: file and row.
        patient: column; None: each record is a patient of its own.
        missing: texts, of all fields, that say that nothing is known.

    Raises:
        ValueError: naming file, row and field, with `on_bad="error"`.
    """
    frame, rows = table
    names = np.array([f"{path.name}:{row}" for row in rows], object)
    problems: dict[int, str] = {}
    ids = names if id is None else _names(frame[id], "id", problems)
    patients = ids if patient is None else _names(frame[patient], "patient", problems)
    if id is not None:
        seen: dict[str, int] = {}
        for place, name in enumerate(ids):
            if seen.setdefault(name, place) != place and place not in problems:
                problems[place] = f"{id}: the id is there twice, first in row {rows[seen[name]]}"
    values = {name: _column(name, field, frame, missing, problems) for name, field in fields.items()}
    if problems and on_bad == "error":
        place = min(problems)
        raise ValueError(f"{path}, row {rows[place]}: {problems[place]}; correct it, or set on_bad to skip")
    kept = np.array([place not in problems for place in range(len(names))], bool)
    skipped = {names[place]: problems[place] for place in sorted(problems)}
    return Read(ids[kept], patients[kept], {name: column[kept] for name, column in values.items()}, skipped)


def _column(
    name: str, field: AnyRecordField, frame: Any, missing: Sequence[str], problems: dict[int, str]
) -> np.ndarray:
    """The values of a field, object [rows]; rows whose cell cannot be read get a problem, unless they have one."""
    nothing = {"", *missing, *field.missing}
    several = isinstance(field, CodeField) and field.first_of
    columns = [each.column for each in field.first_of] if several else [field.column or name]

    def read(row: tuple[Any, ...]) -> tuple[Any, str | None]:
        """Value and problem of a row's cells."""
        told = tuple("" if isinstance(cell, str) and cell.strip() in nothing else cell for cell in row)
        try:
            value = (
                None if all(cell == "" for cell in told) else field.read_first(told) if several else field.read(*told)
            )
        except ValueError as error:
            return None, f"{name}: {error}"
        return value, f"{name}: missing, and required" if value is None and field.required else None

    rows = pd.Series([*zip(*(frame[column] for column in columns), strict=True)], dtype=object)
    try:
        which, distinct = pd.factorize(rows)  # most cells are there many times
    except TypeError:  # lists, of a JSON or Parquet file
        which, distinct = np.arange(len(rows)), rows
    found = [read(row) for row in distinct]
    for place in np.flatnonzero(np.array([problem is not None for _, problem in found], bool)[which]):
        problems.setdefault(int(place), found[which[place]][1])
    values = np.empty(len(rows), object)
    for place, number in enumerate(which):
        values[place] = found[number][0]
    return values


def _names(cells: Any, what: str, problems: dict[int, str]) -> np.ndarray:
    names = np.array([cell.strip() if isinstance(cell, str) else "" for cell in cells], object)
    for place in np.flatnonzero(names == ""):
        problems.setdefault(int(place), f"there is no {what}")
    return names


def _found(values: np.ndarray) -> tuple[str, ...]:
    """The words that a decision takes, sorted."""
    every = (value if isinstance(value, list) else [value] for value in values if value is not None)
    return tuple(sorted({word for words in every for word in words}))


def _counted(read: Read) -> list[str]:
    """How many records were left out, by reason."""
    if not read.skipped:
        return []
    # "id: there twice, first in row 7" is one reason, whichever the row.
    counts = Counter(reason.partition(", first in row")[0] for reason in read.skipped.values())
    listed = [f"{shown(reason)}: {count}" for reason, count in counts.most_common(SHOWN)]
    more = len(counts) - len(listed)
    total = len(read.skipped) + len(read.ids)
    return [
        f"{len(read.skipped)} of {total} records are left out: {'; '.join(listed)}"
        + (f"; {more} more reasons" if more else "")
    ]


def check_labels(labels: Sequence[str], fields: Mapping[str, AnyRecordField]) -> None:
    """Raises ValueError for a name that is no decision with words."""
    fitting = decisions(fields)
    if wrong := [name for name in labels if name not in fitting]:
        raise ValueError(
            f"labels: {quoted(wrong[0])} is no decision of kind code or list; those are {', '.join(fitting) or 'none'}"
        )


def decisions(fields: Mapping[str, AnyRecordField]) -> tuple[str, ...]:
    """The decisions that have words."""
    return tuple(
        n for n, field in fields.items() if field.role == "decision" and isinstance(field, CodeField | ListField)
    )
