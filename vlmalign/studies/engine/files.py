"""Files of artefacts: written whole or not at all, and known by their SHA-256, which is computed once per file.

A large file (a checkpoint's weights) is hashed when it is first met and remembered in the run folder by (device, inode,
size, time of change); a file that was touched is hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmalign.reporting.json_files import parse_json
from vlmalign.reporting.json_shape import NUMBER, Maybe, Values, check_shape


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whatever happens meanwhile."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=1) + "\n")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON Lines, whole or not at all."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def read_rows(path: Path, shape: Any = dict) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; ValueError, naming file and line, for what is none or not of the shape
    (`reporting.json_shape`)."""
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if line:
            rows.append(parse_json(line, path, number))
            check_shape(rows[-1], shape, f"{path}, line {number}")
    return rows


def read_numbers(path: Path, name: str) -> list[float | None]:
    """One number of every line of a `metrics.jsonl`, None where it was not measured; ValueError for what is no number."""
    found = [line.get(name) for line in read_rows(path)]
    check_shape(found, [Maybe(NUMBER)], f"{path}, {name}")
    return found


def read_json(path: Path, shape: Any = dict) -> Any:
    """The object in a JSON file; ValueError, naming file and place, for what is none or not of the shape."""
    found = parse_json(path.read_bytes(), path, 1)
    check_shape(found, shape, str(path))
    return found


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON value, however its keys are ordered."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Hashes:
    """SHA-256 of files, remembered in `path` from start to start."""

    def __init__(self, path: Path):
        self._path = path
        self._known: dict[str, list[Any]] = read_json(path, Values(list)) if path.exists() else {}
        self._new = False

    def of(self, file: Path) -> str:
        """Raises FileNotFoundError for a file that is not there."""
        stat = file.stat()
        mark = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
        key = str(file.resolve())
        known = self._known.get(key)
        if known is None or len(known) != 5 or known[:4] != mark:
            with file.open("rb") as opened:
                known = [*mark, hashlib.file_digest(opened, "sha256").hexdigest()]
            self._known[key] = known
            self._new = True
        return known[4]

    def of_folder(self, folder: Path) -> str:
        """Of all files below a folder: their names, sizes and contents."""
        return digest_of(manifest(folder, self))

    def save(self) -> None:
        """Write down what was hashed, where the run folder has been made."""
        if self._new and self._path.parent.is_dir():
            write_json(self._path, self._known)
            self._new = False


def manifest(folder: Path, hashes: Hashes, leave_out: Iterable[str] = ()) -> dict[str, list[Any]]:
    """File below `folder` -> [bytes, SHA-256], without those in `leave_out` (names of files and of whole folders)."""
    left_out = set(leave_out)
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and not left_out & {name, name.split("/")[0]}:
            found[name] = [path.stat().st_size, hashes.of(path)]
    return found
