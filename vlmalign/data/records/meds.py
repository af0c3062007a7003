"""Event data in the Medical Event Data Standard (MEDS) -> a table with a row for each subject and prediction time.

A data set is a folder: `data/**/*.parquet` with subject_id, time (null for static events), code, numeric_value and perhaps
text_value; `metadata/codes.parquet` lists the codes. A column of the table is made of the events of one code:

    meds:
      at: CONSULTATION                                # its events are the prediction times
      columns:
        age: {code: MEDS_BIRTH, take: years}
        amh: {code: LAB//AMH}                         # the last value up to the prediction time, which is included
        cycles: {code: IVF//CYCLE, take: count, when: before}
        strategy: {code: STRATEGY//*, take: first, when: from}      # what follows the prefix, of the first event from then on

MEDS allows a model what is known up to and including the prediction time. What was decided then has the same time, so an input
that reads the code of a decision must be `before`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from vlmalign.config import Config
from vlmalign.data.sources.row_files import damage_named
from vlmalign.data.sources.text_table import TextTable, as_text
from vlmalign.quoting import quoted, shown

#: columns of the table beside those declared
ID, SUBJECT = "record", "subject_id"
REQUIRED = ("subject_id", "time", "code", "numeric_value")
YEAR = 365.25 * 24 * 3600  #: seconds


class MedsColumn(Config):
    """What is taken of the events of a code."""

    code: Annotated[str, Field(min_length=1)]  #: ends in `*`: every code that begins so, and the value is what follows
    #: last, first: value of that event; max, min: of its numbers; count: of events; years: since the last event
    take: Literal["last", "first", "max", "min", "count", "years"] = "last"
    when: Literal["until", "before", "from"] = "until"  #: until the prediction time, it included; before it; from it on
    days: Annotated[float, Field(gt=0)] | None = None  #: no further from the prediction time than this

    @model_validator(mode="after")
    def _years_look_back(self) -> MedsColumn:
        if self.take == "years" and self.when == "from":
            raise ValueError("take: years counts from an event to the prediction time; set when to until or before")
        return self

    @property
    def prefix(self) -> str | None:
        """The beginning of its codes; None: it is one code."""
        return self.code[:-1] if self.code.endswith("*") else None

    def matches(self, codes: pd.Series) -> pd.Series:
        """Which codes are its own."""
        return codes == self.code if self.prefix is None else codes.str.startswith(self.prefix)

    def overlaps(self, other: MedsColumn) -> bool:
        """Whether some code may be both's."""
        one, two = self.prefix, other.prefix
        if one is None:
            return bool(other.matches(pd.Series([self.code]))[0])
        return other.code.startswith(one) if two is None else one.startswith(two) or two.startswith(one)


class Meds(Config):
    """Prediction times, and the columns that are made for each."""

    at: Annotated[str, Field(min_length=1)]  #: a code
    which: Literal["every", "first", "last"] = "every"  #: of its events for each subject
    columns: Annotated[dict[str, MedsColumn], Field(min_length=1)]

    @model_validator(mode="after")
    def _names(self) -> Meds:
        if taken := {ID, SUBJECT} & self.columns.keys():
            raise ValueError(f"columns: {taken.pop()!r} is made anyway; choose another name")
        return self


class Event(NamedTuple):
    """One observation."""

    subject: int
    time: str | None  #: ISO 8601; None: static
    code: str
    number: float | None = None
    text: str | None = None


def read_meds(folder: Path, meds: Meds) -> TextTable:
    """A row for each subject and prediction time, by subject and time: `ID` (subject@time), `SUBJECT` and the columns.

    Raises:
        FileNotFoundError: for a folder without data/*.parquet.
        ValueError: naming the file, for one that is not in MEDS' schema; for a code that neither the events nor
            metadata/codes.parquet have; and where no subject has a prediction time.
    """
    at = MedsColumn(code=meds.at)
    events, known = _events(folder, [at, *meds.columns.values()])
    for column in (at, *meds.columns.values()):
        _check_code(column, known, folder)
    times = events[at.matches(events["code"]) & events["time"].notna()][["subject_id", "time"]].drop_duplicates()
    times = times.sort_values(["subject_id", "time"])
    if meds.which != "every":
        times = times.groupby("subject_id", as_index=False).agg(meds.which)
    times = times.rename(columns={"time": "at"}).reset_index(drop=True)
    if not len(times):
        raise ValueError(f"{folder}: no event with a time has the code {meds.at!r}, so there is no prediction time")
    frame = pd.DataFrame(
        {
            ID: [f"{subject}@{time.isoformat()}" for subject, time in times.itertuples(index=False)],
            SUBJECT: times["subject_id"].astype(str),
        }
    )
    for name, column in meds.columns.items():
        values = _taken(column, events, times)
        frame[name] = [as_text(value) for value in values]
    return TextTable(frame, np.arange(1, len(frame) + 1))


def write_meds(folder: Path, events: Iterable[Event], *, subjects: int = 100) -> None:
    """Writes a data set: shards data/0.parquet, ... of so many subjects, sorted by subject and time, and the metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = pd.DataFrame(events, columns=["subject_id", "time", "code", "numeric_value", "text_value"])
    rows["time"] = pd.to_datetime(rows["time"], format="ISO8601")
    rows = rows.sort_values(["subject_id", "time"], na_position="first", kind="stable")
    kinds = (pa.int64(), pa.timestamp("us"), pa.string(), pa.float32(), pa.large_string())
    schema = pa.schema(list(zip(rows.columns, kinds, strict=True)))
    (folder / "data").mkdir(parents=True)
    (folder / "metadata").mkdir()
    shard = rows["subject_id"].rank(method="dense").astype(int).sub(1) // subjects
    for number, part in rows.groupby(shard):
        pq.write_table(pa.Table.from_pandas(part, schema, preserve_index=False), folder / "data" / f"{number}.parquet")
    codes = sorted(set(rows["code"]))
    pq.write_table(pa.table({"code": codes, "description": codes}), folder / "metadata" / "codes.parquet")
    about = {"dataset_name": folder.name, "meds_version": "0.4.0"}
    (folder / "metadata" / "dataset.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


def files_of(folder: Path) -> list[Path]:
    """The files of a data set that are read: its shards, and the list of codes."""
    codes = folder / "metadata" / "codes.parquet"
    return [*sorted((folder / "data").rglob("*.parquet")), *([codes] if codes.is_file() else [])]


def _events(folder: Path, columns: Sequence[MedsColumn]) -> tuple[pd.DataFrame, set[str]]:
    """The events of these columns' codes, in order, and all codes that there are."""
    import pyarrow.parquet as pq

    files = files_of(folder)
    known: set[str] = set()
    found = []
    for path in files:
        with damage_named(path):
            names = pq.ParquetFile(path).schema_arrow.names
            if path.name == "codes.parquet" and path.parent.name == "metadata":
                known |= set(pq.read_table(path, columns=["code"])["code"].to_pylist())
                continue
            if missing := [name for name in REQUIRED if name not in names]:
                raise ValueError(f"no column {missing[0]!r}; MEDS has {', '.join(REQUIRED)}")
            wanted = [*REQUIRED, *(["text_value"] if "text_value" in names else [])]
            part = pq.read_table(path, columns=wanted).to_pandas()
        known |= set(part["code"].unique())
        kept = np.any([column.matches(part["code"]) for column in columns], axis=0)
        found.append(part[kept])
    if not found:
        raise FileNotFoundError(f"no data/*.parquet in {folder}; give the folder of a MEDS data set")
    events = pd.concat(found, ignore_index=True)
    if "text_value" not in events:
        events["text_value"] = None
    return events.sort_values(["subject_id", "time"], na_position="first", kind="stable", ignore_index=True), known


def _check_code(column: MedsColumn, known: set[str], folder: Path) -> None:
    found = any(code.startswith(column.prefix) for code in known) if column.prefix is not None else column.code in known
    if not found:
        near = difflib.get_close_matches(column.code, known, n=1, cutoff=0.5)
        hint = f"; the nearest is {shown(near[0])}" if near else ""
        raise ValueError(f"{folder}: no event has the code {quoted(column.code)}{hint}")


def _taken(column: MedsColumn, events: pd.DataFrame, times: pd.DataFrame) -> Iterator[object]:
    """The value for each row of `times`, None where there is none."""
    own = events[column.matches(events["code"])]
    both = times.reset_index(names="row").merge(own, on="subject_id")
    gap = (both["at"] - both["time"]).dt.total_seconds()  # NaN of a static event, which is known before
    late = {"until": gap < 0, "before": gap <= 0, "from": ~(gap <= 0)}[column.when]
    if column.days is not None:
        late |= gap.abs() > column.days * 24 * 3600
    both, gap = both[~late], gap[~late]
    if column.take == "count":
        value: Mapping[int, object] = both.groupby("row").size()
        return (int(value.get(row, 0)) for row in range(len(times)))
    if column.take == "years":
        value = np.floor(10 * gap / YEAR).groupby(both["row"]).last().dropna() / 10
    elif column.take in ("max", "min"):
        value = both.groupby("row")["numeric_value"].agg(column.take).dropna()
    else:
        value = _values(column, both).groupby(both["row"]).agg(column.take)
    return (value.get(row) for row in range(len(times)))


def _values(column: MedsColumn, events: pd.DataFrame) -> pd.Series:
    """What each event says: the rest of its code, its number, its text, or 1: that it was."""
    if column.prefix is not None:
        return events["code"].str.removeprefix(column.prefix)
    # A float32 of 1.5 is 1.5, one of 0.1 is 0.10000000149: the shortest text that reads back as it is what was written.
    numbers = events["numeric_value"].map(lambda number: None if pd.isna(number) else float(str(np.float32(number))))
    return numbers.astype(object).where(numbers.notna(), events["text_value"]).where(lambda value: value.notna(), 1)
