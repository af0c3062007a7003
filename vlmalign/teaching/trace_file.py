"""The file of traces, one JSON line each, and those beside it; appended to line by line, so that a kill loses nothing.

FILE                  {"id": film, "trace": text, ...}: what `data: {set: ..., traces: FILE}` of a study reads
FILE.failed.jsonl     films without one: why, and what they took
FILE.rejected.jsonl   traces that experts rejected
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, NonNegativeInt, ValidationError

from vlmalign.config import Config
from vlmalign.data.sources.json_lines import lines, parse
from vlmalign.studies.engine.files import write_rows


class Line(Config):
    """What every line says. Fields that other tools add are kept."""

    model_config = ConfigDict(extra="allow", frozen=True)

    id: str
    labels: tuple[str, ...] = ()  #: the film's true labels
    image: str | None = None  #: path of the film
    format: str | None = None
    model: str | None = None  #: who wrote it
    instruction: str | None = None  #: first digits of the SHA-256 of the text that the teacher was given
    asked: NonNegativeInt = 0  #: how often
    tokens_in: NonNegativeInt = 0  #: of all times it was asked
    tokens_out: NonNegativeInt = 0


class Trace(Line):
    """A film's trace."""

    trace: str


class Failed(Line):
    """A film without a trace."""

    kind: Literal[
        "answer", "endpoint", "image"
    ]  #: what failed: the checks of the answers, the requests, the film's file
    reason: str  #: in words, without any of the answer's text


def failed_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.failed.jsonl")


def rejected_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.rejected.jsonl")


def read_traces(path: Path) -> dict[str, Trace]:
    """id -> trace; FileNotFoundError, or ValueError naming file and line."""
    found: dict[str, Trace] = {}
    for number, row in _rows(path, Trace):
        if row.id in found:
            raise ValueError(f'{path}, line {number}: the "id" of an earlier line again; remove one of the two')
        found[row.id] = row
    return found


def read_failed(path: Path) -> dict[str, Failed]:
    """id -> what failed last; empty where there is no file."""
    return {row.id: row for _, row in _rows(path, Failed)} if path.exists() else {}


def _rows(path: Path, kind: type[Line]) -> Iterable[tuple[int, Any]]:
    for number, _, text in lines(path):
        try:
            yield number, kind.model_validate(parse(text))
        except ValidationError as error:
            # pydantic quotes values in its message, and a value may be a patient's
            where = ", ".join(sorted({".".join(map(str, each["loc"])) for each in error.errors()}))
            raise ValueError(f"{path}, line {number}: not a line of traces (wrong or missing: {where})") from None
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def write_traces(path: Path, rows: Iterable[Line]) -> None:
    """The whole file anew, or not at all."""
    write_rows(path, (as_row(row) for row in rows))


def as_row(row: Line) -> dict[str, Any]:
    """What is written of a line: the id and the text first, nothing that is not known."""
    values = row.model_dump(mode="json", exclude_none=True)
    return {name: values[name] for name in sorted(values, key=lambda name: (name != "id", name != "trace"))}


def mend(path: Path) -> bool:
    """Cut off a last line that a kill left in part; whether there was one. A whole one without its line break gets it."""
    if not path.exists():
        return False
    with path.open("r+b") as file:
        text = file.read()
        if not text or text.endswith(b"\n"):
            return False
        whole, _, last = text.rpartition(b"\n")
        try:
            parse(last)
        except ValueError:
            file.truncate(len(whole) + 1 if whole else 0)
            return True
        file.write(b"\n")
    return False


class Appended:
    """A file that lines are added to; each is on the disk before `add` returns."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab", buffering=0)

    def add(self, row: Line) -> None:
        line = (json.dumps(as_row(row), ensure_ascii=False) + "\n").encode()
        while line:  # a write may take a part only
            line = line[self._file.write(line) :]
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def tokens(rows: Iterable[Line]) -> tuple[int, int]:
    """Tokens in and out of these lines, of all times that they were asked."""
    found = list(rows)
    return sum(row.tokens_in for row in found), sum(row.tokens_out for row in found)


def same_origin(path: Path, rows: Mapping[str, Trace], *, format: str, model: str) -> None:
    """Raises ValueError for a file whose traces are of another format or by another model."""
    for row in rows.values():
        if (row.format, row.model) != (format, model):
            raise ValueError(
                f"{path} holds traces of format {row.format} by {row.model}, asked for now are {format} by {model}; "
                "give another --out"
            )
