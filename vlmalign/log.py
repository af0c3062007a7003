"""The files in which a run writes down what happens: `metrics.jsonl` (numbers by step), `timing.jsonl` (seconds by stage).

Both are JSON Lines: one object a line, appended, readable while the run goes on. No line holds a time of day or
anything else that differs between a run and its repetition, except the seconds in `timing.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np


class Position(NamedTuple):
    """A place in a log: what stands before it is known."""

    bytes: int
    sha256: str


EMPTY = Position(0, hashlib.sha256().hexdigest())


class MetricsWriter:
    """Appends one JSON object a line to `path`, so that a run killed at any moment can continue its file exactly.

    Every line reaches the operating system at once (it survives `kill -9`) and the disk at least every
    `sync_seconds` and whenever `position` is asked for (it survives a power cut). Store `position()` in each
    checkpoint and call `rewind` with it on resume: lines written after that checkpoint are dropped, and the steps
    they belonged to are run and written again. A position holds the SHA-256 of what stands before it, so lines that
    were changed since are noticed. A file is for one writer at a time.

    JSON has no word for NaN and infinities: such a number is written as null, and the line says under "nonfinite"
    which names had which ("nan", "inf", "-inf"). `nonfinite` counts those this writer has seen.

    Of the processes of one run one writes. With `writes=False` this checks what it is given and touches no file; its
    position is that of an empty file.
    """

    def __init__(self, path: str | Path, *, sync_seconds: float = 5.0, writes: bool = True):
        self.path = Path(path)
        self.nonfinite = 0
        self._sync_seconds = sync_seconds
        self._synced = time.monotonic()
        self._file = None
        self._hash = hashlib.sha256()
        if not writes:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  (open for the writer's life)
        self._drop_torn_line()
        self._hash = digest_before(self.path)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Append one line. Values are plain JSON values, nested too, and numpy or JAX scalars.

        Raises ValueError for arrays with dimensions and for other objects, naming the entry.
        """
        if "nonfinite" in metrics:
            raise ValueError('metrics["nonfinite"] is written by MetricsWriter itself; choose another name')
        lost: dict[str, str] = {}
        line = {name: _plain(value, name, lost) for name, value in metrics.items()}
        if lost:
            line["nonfinite"] = lost
            self.nonfinite += len(lost)
        if self._file is None:
            return
        # Unbuffered, one call a line: a kill between two of them leaves whole lines.
        data = json.dumps(line, allow_nan=False).encode() + b"\n"
        with naming(self.path):
            self._file.write(data)
        self._hash.update(data)
        if time.monotonic() - self._synced >= self._sync_seconds:
            self._sync()

    def position(self) -> Position:
        """Where the file ends, all of it on disk by the time this returns: what a checkpoint records."""
        if self._file is None:
            return EMPTY
        self._sync()
        return Position(os.fstat(self._file.fileno()).st_size, self._hash.hexdigest())

    def rewind(self, position: Sequence[Any]) -> None:
        """Drop what was written after `position()` returned this (also as JSON gives it back: a list).

        Raises ValueError when the file does not begin as it did then.
        """
        if self._file is None:
            return
        position = Position(*position)
        self._hash = require_beginning(self.path, position)
        self._file.truncate(position.bytes)
        self._sync()

    def close(self) -> None:
        if self._file is not None:
            self._sync()
            self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _drop_torn_line(self) -> None:
        # A power cut can leave part of a last line: it is no JSON, and the next line must not be glued to it.
        size = os.fstat(self._file.fileno()).st_size
        if size and _byte_before(self.path, size) != b"\n":
            self._file.truncate(self.path.read_bytes().rfind(b"\n") + 1)

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


def digest_before(path: Path, end: int | None = None) -> Any:
    """SHA-256 (hashlib's object) of the first `end` bytes of a file; of all of it for None."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20 if end is None else min(2**20, end - file.tell())):
            found.update(block)
    return found


def require_beginning(path: Path, position: Position) -> Any:
    """The hash of a log up to a position; ValueError when the log does not begin as it did when the position was asked."""
    size = path.stat().st_size
    advice = "restore the file, or start in a new run folder"
    if size < position.bytes:
        raise ValueError(f"{path} has {size} bytes, but the checkpoint was made when it had {position.bytes}: {advice}")
    found = digest_before(path, position.bytes)
    if found.hexdigest() != position.sha256:
        raise ValueError(
            f"{path}: its first {position.bytes} bytes are not those that were there when the checkpoint was made: {advice}"
        )
    return found


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A full disk says of which file, where the system only says that there is one."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def stage_timer(path: str | Path, stage: str, *, writes: bool = True) -> Iterator[None]:
    """Appends {"stage", "seconds"} to the file at `path` when its block ends, also by an error; one process `writes`.

    A stage that was interrupted and continued has several lines: its time is their sum.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        line = json.dumps({"stage": stage, "seconds": round(time.perf_counter() - started, 3)})
        if writes:
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")


def _plain(value: Any, name: str, lost: dict[str, str]) -> Any:
    """`value` in JSON's types; names of NaN and infinities are added to `lost`."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{name}.{key}", lost) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{name}.{index}", lost) for index, item in enumerate(value)]
    if isinstance(value, int):
        return int(value)
    if not isinstance(value, float):
        value = _scalar(value, name)
    if isinstance(value, float) and not math.isfinite(value):
        lost[name] = str(float(value))
        return None
    return value


def _scalar(value: Any, name: str) -> bool | int | float:
    """The number in a numpy or JAX scalar of any float width (waits for the device)."""
    array = np.asarray(value)
    if array.ndim:
        raise ValueError(
            f'metrics["{name}"] must be a number, found an array of shape {array.shape} ({array.dtype}); '
            "reduce it first (a sum with its count, or a mean), or write it to a file of its own"
        )
    if array.dtype == bool:
        return bool(array)
    if np.issubdtype(array.dtype, np.integer):
        return int(array)
    if array.dtype.kind in "OUSMm" or np.issubdtype(array.dtype, np.complexfloating):
        raise ValueError(f'metrics["{name}"] must be a number or text, found {type(value).__name__}: {value!r}')
    return float(array)


def _byte_before(path: Path, position: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(position - 1)
        return file.read(1)
