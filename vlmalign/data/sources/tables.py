"""Reading CSV tables (plain or .gz) by column name, and keeping file paths from tables inside their root.

Nothing is guessed: a missing or unknown column, or a label value outside 1 / 0 / -1 / blank, is an error that
names the file, the row (as an editor counts lines, the header being 1) and what was found.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vlmalign.quoting import MOST_OF_LINE, quoted, shown

#: Texts that label columns may hold, and their value; blank means not mentioned.
LABEL_VALUES = {"1": 1.0, "1.0": 1.0, "0": 0.0, "0.0": 0.0, "-1": -1.0, "-1.0": -1.0, "": np.nan}
#: names of a table that a message lists
SHOWN = 12


def find_table(root: Path, *names: str) -> Path:
    """The first of `names`, plain or with .gz, that exists in `root`; FileNotFoundError listing what was tried."""
    tried = [root / (name + suffix) for name in names for suffix in ("", ".gz")]
    for path in tried:
        if path.is_file():
            return path
    listed = ", ".join(path.name for path in tried)
    raise FileNotFoundError(f"none of {listed} in {root}; check that the root is the data set's own folder")


def read_table(path: Path, required: Sequence[str], *, closed: bool = False) -> pd.DataFrame:
    """The table as text (blank = ""), with at least the `required` columns, under the names given there.

    A column also matches with `_` in place of spaces, as some mirrors write them. With `closed` only the required
    columns may be present. Raises FileNotFoundError, or ValueError for a file that cannot be read, and for
    missing, repeated or (when closed) unexpected columns, with the nearest known names.
    """
    path = Path(path)
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="") as file:
            rows = csv.reader(file, strict=True)
            canonical = {_plain(name): name for name in required}
            names = [canonical.get(_plain(name), name.strip()) for name in next(rows, [])]
            _check_columns(path, names, required, closed=closed)
            _check_widths(path, rows, len(names))
        return pd.read_csv(path, names=names, header=0, dtype=str, keep_default_na=False, index_col=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"no table {path}") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error, pd.errors.ParserError) as error:
        raise ValueError(f"cannot read table {path}: {error}") from error


def _plain(name: str) -> str:
    return name.strip().lstrip("\ufeff").replace("_", " ")


def _check_widths(path: Path, rows: Iterable[list[str]], width: int) -> None:
    """Refuses rows that are too short or too long: pandas would fill or cut them, and a cut file look whole."""
    blank = 0
    for number, row in enumerate(rows, start=2):
        if not row:
            blank = blank or number
        elif blank or len(row) != width:
            found = 0 if blank else len(row)
            raise ValueError(f"{path}, row {blank or number}: found {found} fields, expected {width}")


def _check_columns(path: Path, names: list[str], required: Sequence[str], *, closed: bool) -> None:
    missing = [name for name in required if name not in names]
    repeated = sorted(name for name, count in Counter(names).items() if name and count > 1)
    unexpected = [name for name in names if name not in required] if closed else []
    problems = [missing_column(name, names) for name in missing[:3]]
    problems += [f"and {len(missing) - 3} more"] if len(missing) > 3 else []
    for name in unexpected[:SHOWN]:
        near = difflib.get_close_matches(name, required, n=3, cutoff=0.5)
        problems.append(f"unexpected column {quoted(name)}" + (f" (nearest known: {', '.join(near)})" if near else ""))
    problems += [f"repeated column {quoted(name)}" for name in repeated[:SHOWN]]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}; expected columns: {', '.join(required)}")


def missing_column(name: str, found: Iterable[str]) -> str:
    """Words for a column that a table does not have: the nearest that it has, or all of them."""
    found = [column for column in found if column]
    near = difflib.get_close_matches(name, found, n=3, cutoff=0.5)
    known = f"nearest found: {_listing(near)}" if near else f"found: {_listing(found) or 'none'}"
    return f"missing column {name!r} ({known})"


def _listing(names: Sequence[str]) -> str:
    """Some names of a table's own, in a message."""
    return ", ".join(shown(name, 40) for name in names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def label_values(
    frame: pd.DataFrame,
    path: Path,
    labels: Sequence[str],
    *,
    known: Mapping[str, float] = LABEL_VALUES,
    rows: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [rows, labels]: 1, 0, -1 or NaN for blank; ValueError naming file, row, column and value.

    `known`: texts and their values; `rows`: the line of each row in the file, 2, 3, ... when not given.
    """
    numbers = np.arange(len(frame)) + 2 if rows is None else rows
    values = np.empty((len(frame), len(labels)), np.float32)
    for column, label in enumerate(labels):
        text = frame[label].str.strip()
        listed = text.isin(list(known)).to_numpy()
        if not listed.all():
            row = int(np.argmin(listed))
            raise ValueError(
                f"{path}, row {numbers[row]}, column {label!r}: found {quoted(text.iloc[row])}, expected {_listed(known)}"
            )
        values[:, column] = text.map(known).to_numpy(np.float32)
    return values


def _listed(known: Mapping[str, float]) -> str:
    texts = [text for text in known if text and not text.endswith(".0")]
    return f"{', '.join(texts)} or blank" if "" in known else ", ".join(texts)


def positives(values: np.ndarray, uncertain: str = "negative") -> np.ndarray:
    """bool [rows, labels]: only 1 is positive; -1 counts as `uncertain` says; 0 and blank are absent."""
    if uncertain not in ("negative", "positive", "ignore"):
        raise ValueError(f"uncertain must be 'negative', 'positive' or 'ignore', found {uncertain!r}")
    return (values == 1) | (values == -1) if uncertain == "positive" else values == 1


def ignored(values: np.ndarray, uncertain: str) -> np.ndarray:
    """bool [rows, labels]: the values -1 for which a film is left out; none unless `uncertain` is 'ignore'."""
    return (values == -1) & (uncertain == "ignore")


def filter_words(split: str | None, views: Sequence[str] | None, found: pd.Series | None) -> str:
    """A filter for messages: the split and the views asked for, with the views that the column `found` has."""
    words = [] if split is None else [f"split {split!r}"]
    if views is not None and found is not None:
        known = list(found.value_counts().index)
        listed = _listing([value or "blank" for value in known])
        words.append(f"views {', '.join(views)} (the table has {listed})")
    return " and ".join(words)


def stays_inside(relative: str) -> bool:
    """Whether a relative path, as written, cannot leave its root (no file is looked at)."""
    return not (relative.startswith(("/", "\\")) or "\0" in relative or ".." in relative.replace("\\", "/").split("/"))


def inside(root: Path, relative: str | Path) -> Path:
    """`root / relative` with links followed; ValueError when it lies outside `root` (.., absolute, or by a link)."""
    base = Path(root).resolve()
    if not stays_inside(str(relative)):
        raise ValueError(
            f"path {quoted(relative)} leaves the data root {root}; paths must be relative and without '..'"
        )
    try:
        path = (base / relative).resolve()
    except (OSError, RuntimeError):  # RuntimeError: Python's word, until 3.13, for links that lead in a circle
        raise ValueError(
            f"path {quoted(relative)} under {root} cannot be followed: links in a circle, or too long"
        ) from None
    if not path.is_relative_to(base):
        raise ValueError(
            f"path {quoted(relative)} leads by a link to {shown(path, MOST_OF_LINE)}, outside the data root {root}"
        )
    return path
