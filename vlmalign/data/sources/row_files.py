"""Files of rows with random access: JSON Lines, Parquet, and folders saved by Hugging Face `datasets`.

Parquet is read by pyarrow and saved folders by `load_from_disk`, both as they store values: nothing is decoded, and
nothing is copied to a cache in the user's home.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vlmalign.data.sources.json_lines import lines, parse
from vlmalign.quoting import MOST_OF_LINE, shown

#: rows that are turned into Python objects at once
_AT_ONCE = 64


@runtime_checkable
class RowFile(Protocol):
    """`len(file)` rows; `file[i]` is a dict, and raises ValueError where the row cannot be read."""

    files: tuple[Path, ...]  #: what was read

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> dict[str, Any]: ...

    def name(self, i: int) -> str:
        """File and line, for messages and as an id."""
        ...


class JsonRows:
    """Lines of a JSON Lines file that are not empty. Only where they begin is kept in memory."""

    def __init__(self, path: Path):
        self.path, self.files = path, (path,)
        self._places = [(line.number, line.offset, len(line.text)) for line in lines(path)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: int) -> dict[str, Any]:
        _, offset, length = self._places[i]
        with self.path.open("rb") as file:
            file.seek(offset)
            return parse(file.read(length))

    def name(self, i: int) -> str:
        return f"{self.path.name}:{self._places[i][0]}"


class ArrowRows:
    """Rows of Arrow tables that are read piece by piece; the newest piece is kept."""

    def __init__(self, path: Path, files: tuple[Path, ...], ends: list[int], piece: Any):
        """`ends`: rows up to the end of each piece; `piece(k)` -> that table."""
        self.path, self.files, self._ends, self._piece = path, files, ends, piece
        self._newest: tuple[int, Any] | None = None
        self._objects: tuple[int, list[dict[str, Any]]] = (-1, [])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, i: int) -> dict[str, Any]:
        k = bisect.bisect_right(self._ends, i)
        start = self._ends[k - 1] if k else 0
        first = start + (i - start) // _AT_ONCE * _AT_ONCE
        if self._objects[0] != first:
            with damage_named(self.path):
                if self._newest is None or self._newest[0] != k:
                    self._newest = None  # before the next is read: two might not fit
                    piece = self._piece(k)
                    piece.validate(full=True)  # Arrow takes lengths on trust, and would read beyond its memory
                    self._newest = (k, piece)
                self._objects = (first, self._newest[1].slice(first - start, _AT_ONCE).to_pylist())
        return self._objects[1][i - first]

    def name(self, i: int) -> str:
        return f"{self.path.name}:{i + 1}"


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turns what pyarrow raises for a damaged file into ValueError, naming the file."""
    import pyarrow as pa

    try:
        yield
    # What it meets in the bytes comes as its own types, text that is no UTF-8 and times out of range as Python's.
    except (OSError, ValueError, OverflowError, pa.ArrowException) as error:
        what = "a Parquet file" if path.suffix.lower() == ".parquet" else "Arrow data"
        raise ValueError(f"{path}: not {what} that can be read ({shown(_words(error), MOST_OF_LINE)})") from error


def parquet_rows(path: Path) -> ArrowRows:
    """A Parquet file, row group by row group."""
    import pyarrow.parquet as pq

    with damage_named(path):
        file = pq.ParquetFile(path, memory_map=True)
    counts = (file.metadata.row_group(k).num_rows for k in range(file.num_row_groups))
    return ArrowRows(path, (path,), list(_sums(counts)), file.read_row_group)


def saved_rows(path: Path, split: str | None) -> ArrowRows:
    """A folder that `Dataset.save_to_disk` wrote, or one split of a `DatasetDict`'s."""
    import datasets

    if (path / "dataset_dict.json").is_file():
        found = sorted(folder.name for folder in path.iterdir() if (folder / "state.json").is_file())
        if split not in found:
            raise ValueError(f"{path} holds the splits {', '.join(found)}; set split to one of them, found {split!r}")
        path = path / split
    elif split is not None:
        raise ValueError(f"{path} holds no splits (a Dataset, not a DatasetDict); leave split out")
    if not (path / "state.json").is_file():
        raise ValueError(f"{path}: not a folder that save_to_disk wrote (no state.json); give that folder, or a file")
    try:
        saved = datasets.load_from_disk(str(path)).with_format("arrow")
    except Exception as error:  # of whatever type: it takes its JSON files for what it has written
        why = f"{type(error).__name__}: {shown(_words(error), MOST_OF_LINE)}"
        raise ValueError(f"{path}: a saved folder that `datasets` cannot read ({why}); save it again") from error
    ends = list(_sums(min(_AT_ONCE, len(saved) - start) for start in range(0, len(saved), _AT_ONCE)))
    files = tuple(sorted(file for file in path.iterdir() if file.is_file()))
    return ArrowRows(path, files, ends, lambda k: saved[k * _AT_ONCE : (k + 1) * _AT_ONCE])


def open_rows(path: Path, split: str | None = None) -> RowFile:
    """The file or folder at `path`, by its ending.

    Raises:
        FileNotFoundError: naming the path.
        ValueError: for what is none of the formats.
    """
    if path.is_dir():
        return saved_rows(path, split)
    if split is not None:
        raise ValueError(f"split is of saved folders, and {path} is a file; leave it out")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return parquet_rows(path) if path.suffix.lower() == ".parquet" else JsonRows(path)


def _words(error: Exception) -> str:
    """What a library says, in one line."""
    return " ".join(str(error).split())


def _sums(counts: Iterator[int]) -> Iterator[int]:
    total = 0
    for count in counts:
        total += count
        yield total
