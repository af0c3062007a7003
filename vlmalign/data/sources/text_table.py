"""Tables in CSV (plain or .gz), Parquet, JSON Lines or a saved folder as one thing: text under the names of columns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from vlmalign.data.sources.json_lines import lines, parse
from vlmalign.data.sources.row_files import damage_named, saved_rows
from vlmalign.data.sources.tables import missing_column, read_table

ENDINGS = (".csv", ".csv.gz", ".parquet", ".jsonl", ".ndjson")


class TextTable(NamedTuple):
    """Cells are text, "" where there is nothing; lists stay lists."""

    frame: pd.DataFrame
    rows: np.ndarray  #: int: the line of each row in the file; in Parquet and saved folders its number from 1


def check_ending(path: Path) -> None:
    """ValueError for a file whose name does not say that it is one of the formats."""
    if not path.name.lower().endswith(ENDINGS):
        raise ValueError(f"a table's name ends in {', '.join(ENDINGS)}; found {path.name!r}")


def read_text_table(path: Path, required: Sequence[str], split: str | None = None) -> TextTable:
    """The table with all its columns, of which `required` must be there; `split` is of a folder saved by `datasets`.

    Raises:
        FileNotFoundError: naming the path.
        ValueError: for a file that cannot be read, and a missing column, with the nearest that there are.
    """
    if path.is_dir():
        saved = saved_rows(path, split)
        return _of_rows(path, [saved[i] for i in range(len(saved))], list(range(1, len(saved) + 1)), required)
    check_ending(path)
    if path.name.lower().endswith((".csv", ".csv.gz")):
        frame = read_table(path, required)
        return TextTable(frame, np.arange(len(frame)) + 2)
    values, rows = _parquet(path) if path.suffix.lower() == ".parquet" else _json(path)
    return _of_rows(path, values, rows, required)


def _of_rows(path: Path, values: list[dict[str, Any]], rows: list[int], required: Sequence[str]) -> TextTable:
    columns = list(dict.fromkeys(name for row in values for name in row))
    if missing := [name for name in required if name not in columns]:
        raise ValueError(f"{path}: {'; '.join(missing_column(name, columns) for name in missing)}")
    cells = {name: np.empty(len(values), object) for name in columns}
    for name, column in cells.items():
        column[:] = [as_text(row.get(name)) for row in values]
    return TextTable(pd.DataFrame(cells), np.asarray(rows, int))


def as_text(value: Any) -> Any:
    """A cell as text; lists and objects as they are.

    >>> [as_text(value) for value in (None, True, 3.0, 0.5, float("nan"), "x")]
    ['', 'true', '3', '0.5', '', 'x']
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # tables with gaps turn whole numbers into floats
    return value if isinstance(value, list | dict) else str(value)


def _parquet(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    import pyarrow.parquet as pq

    if not path.is_file():
        raise FileNotFoundError(f"no table {path}")
    with damage_named(path):
        file = pq.ParquetFile(path)
        # Images inside the table would fill the memory, and are no text.
        names = [field.name for field in file.schema_arrow if not _holds_bytes(field.type)]
        table = file.read(columns=names)
        table.validate(full=True)
        values = table.to_pylist()
    return values, list(range(1, len(values) + 1))


def _holds_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return True
    return any(_holds_bytes(kind.field(i).type) for i in range(kind.num_fields)) if pa.types.is_nested(kind) else False


def _json(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    values, rows = [], []
    for number, _, text in lines(path):
        try:
            values.append(parse(text))
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
        rows.append(number)
    return values, rows
