"""Records of patients as a source: a table with a declared schema, of which each row is told as a summary.

    kind: ehr
    path: cycles.csv                # or .csv.gz, Parquet, JSON Lines, a folder saved by `datasets`, a MEDS data set (`meds`)
    id: cycle
    patient: patient
    missing: [NA, unknown]
    fields:
      age: {kind: number, unit: years, low: 18, high: 55}
      ethnicity: {kind: code, codes: {1: White, 2: Black}}
      centre: {kind: code, role: group}
      strategy: {kind: code, role: decision, required: true, codes: {I: ICSI, V: IVF}}
    after: [eggs, live_birth]       # columns known only after the decision: nothing may read them

Only fields with the role `input` may be told. Columns that no field names are not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from vlmalign.config import FREE, Config
from vlmalign.data.records import clinic
from vlmalign.data.records import meds as events
from vlmalign.data.records.fields import AnyRecordField, CodeField
from vlmalign.data.records.records import SUMMARY, Records, check_labels, decisions, read_records
from vlmalign.data.records.summary import Summary
from vlmalign.data.sources.inventing import write_folder
from vlmalign.data.sources.settings import Place, Positive
from vlmalign.data.sources.tables import missing_column
from vlmalign.data.sources.text_table import TextTable, read_text_table
from vlmalign.quoting import quoted

#: what examples and tasks call other things
RESERVED = (SUMMARY, "messages", "prompt", "chosen", "rejected", "image", "images", "trace", "truth", "patient")


class Invented(Config):
    """Write records of an invented fertility clinic (`data.records.clinic`) at `path` first, if nothing is there."""

    records: Positive
    seed: int = 0


class EhrSource(Config):
    """A table of records."""

    kind: Literal["ehr"]
    path: Annotated[Path, FREE]
    split: str | None = None  #: of a saved DatasetDict
    phantom: Invented | None = None
    meds: events.Meds | None = None  #: `path` is a MEDS data set, of which this makes a table
    id: str | None = None  #: column; None: file and row
    patient: str | None = None  #: column; None: each record is a patient of its own
    fields: dict[str, AnyRecordField] = Field(default_factory=dict)  #: none: those of the invented clinic
    after: tuple[str, ...] = ()  #: columns known only after the decision
    take: dict[str, tuple[str, ...]] = Field(default_factory=dict)  #: column -> texts of which a row must have one
    missing: tuple[str, ...] = ()  #: texts, beside blanks, that say that nothing is known
    labels: tuple[str, ...] | None = None  #: decisions whose words balanced sets balance; None: all that have words
    summary: Summary = Summary()
    on_bad: Literal["error", "skip"] = (
        "error"  #: a record that cannot be used stops the run, or is left out and counted
    )

    @model_validator(mode="after")
    def _consistent(self) -> EhrSource:
        if self.phantom is None and not self.fields:
            raise ValueError("fields: name the fields of a record, each with its kind")
        if self.meds is not None and (self.phantom or self.id or self.patient):
            raise ValueError("meds: records are known by subject and time; leave id, patient and phantom out")
        if self.phantom is not None and self.path.suffix != ".csv":
            raise ValueError(f"path: invented records are written as .csv, found {self.path.name!r}")
        for name in self.fields:
            if not re.fullmatch(r"[A-Za-z]\w*", name) or name in RESERVED:
                raise ValueError(
                    f"fields: {name!r} cannot be a field's name: use letters, digits and _, not a word of {', '.join(RESERVED)}"
                )
        self._check_roles()
        self.summary.told(self.schema)
        check_labels(self.labels or (), self.schema)
        return self

    def _check_roles(self) -> None:
        """No input may read what another role, or the list `after`, says is not known before the decision."""
        hidden = dict.fromkeys(self.after, "stands in `after`")
        for name, field in self.schema.items():
            if field.role != "input":
                hidden |= dict.fromkeys(columns_of(name, field), f"is read by {name!r}, whose role is {field.role}")
        if self.meds is not None:
            hidden |= self._of_later_events(hidden)
        for column, what in ((self.id, "id"), (self.patient, "patient")):
            if column is not None:
                hidden.setdefault(column, f"is the {what}")
        for name, field in self.schema.items():
            if field.role == "input" and (wrong := [c for c in columns_of(name, field) if c in hidden]):
                raise ValueError(
                    f"fields.{name}: the column {wrong[0]!r} {hidden[wrong[0]]}, and an input must be known before the decision; "
                    "give it another role, or take it out"
                )

    def _of_later_events(self, hidden: Mapping[str, str]) -> dict[str, str]:
        """Columns of events from the prediction time on; and those that may hold the event of a decision, its time included."""
        columns = self.meds.columns
        decided = [columns[name] for name in hidden if name in columns]
        found = {}
        for name, column in columns.items():
            if column.when == "from":
                found[name] = "takes events from the prediction time on"
            elif column.when == "until" and any(column.overlaps(other) for other in decided):
                found[name] = "may take the event of the decision itself (set when: before)"
        return found | dict(hidden)

    @property
    def schema(self) -> dict[str, AnyRecordField]:
        """The fields, those of the invented clinic where none are given."""
        return self.fields or clinic.FIELDS

    @property
    def hidden(self) -> list[str]:
        """Fields that no prompt may name."""
        return [name for name, field in self.schema.items() if field.role != "input"]

    @property
    def root(self) -> Path:
        """The folder that an invented table is written into."""
        return self.path.parent

    @property
    def folder(self) -> Path:
        """Where it lies, as the config says it."""
        return self.path.parent

    def invent(self, place: Place) -> None:
        """Writes the invented records, whole or not at all; a folder that exists is left as it is."""
        if (made := self.phantom) is not None:
            name = self.path.name
            write_folder(place(str(self.root)), lambda new: clinic.write(new / name, made.records, seed=made.seed))

    def open(self, place: Place) -> Records:
        """The records.

        Raises:
            FileNotFoundError: for a table that is not there.
            ValueError: naming the table, and row and field where there is one.
        """
        path = place(str(self.path))
        given = self.phantom is not None and not self.fields
        id, patient = (clinic.ID, clinic.PATIENT) if given else (self.id, self.patient)
        if self.meds is not None:
            id, patient = events.ID, events.SUBJECT
        needed = [column for name, field in self.schema.items() for column in columns_of(name, field)]
        needed += [*self.take, *(column for column in (id, patient) if column is not None)]
        needed = list(dict.fromkeys(needed))
        whole = self._table(path, needed)
        # As Python's own texts: cells of pandas' text columns are made one by one, which is slow.
        table, notes = self._taken(TextTable(whole.frame[needed].astype(object), whole.rows), path)
        declared = {*needed, *self.after, *(clinic.AFTER if given else ())}
        if unread := [column for column in whole.frame if column not in declared]:
            notes.append(f"{path}: {len(unread)} columns are not declared and not read, such as {quoted(unread[0])}")
        read = read_records(table, path, self.schema, id=id, patient=patient, missing=self.missing, on_bad=self.on_bad)
        labels = decisions(self.schema) if self.labels is None else self.labels
        return Records(path, self.schema, self.summary, read, labels=labels, files=self._files(path), notes=notes)

    def _table(self, path: Path, needed: list[str]) -> TextTable:
        if self.meds is None:
            return read_text_table(path, needed, self.split)
        table = events.read_meds(path, self.meds)
        if absent := [name for name in needed if name not in table.frame]:
            raise ValueError(f"meds.columns: {missing_column(absent[0], self.meds.columns)}")
        return table

    def _files(self, path: Path) -> list[Path]:
        if self.meds is not None:
            return events.files_of(path)
        return sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]

    def _taken(self, table: TextTable, path: Path) -> tuple[TextTable, list[str]]:
        """The rows that `take` takes, and a note of how many it does not."""
        keep = np.ones(len(table.frame), bool)
        for column, texts in self.take.items():
            keep &= [isinstance(cell, str) and cell.strip() in texts for cell in table.frame[column]]
        notes = [] if keep.all() else [f"{path}: {int((~keep).sum())} of {len(keep)} rows are not taken (take)"]
        return TextTable(table.frame[keep], table.rows[keep]), notes


def columns_of(name: str, field: AnyRecordField) -> list[str]:
    """The columns that a field reads."""
    if isinstance(field, CodeField) and field.first_of:
        return [each.column for each in field.first_of]
    return [field.column or name]
