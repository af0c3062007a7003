"""The table that `vlmalign sample` draws from: columns of a file, a bare 0/1 matrix, or a source of a study."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from vlmalign.data.sources.films import Films
from vlmalign.data.sources.table import VALUES, Labels, chosen, filled, read_labels
from vlmalign.data.sources.text_table import ENDINGS, read_text_table


class Pool(NamedTuple):
    """What is drawn from."""

    frame: pd.DataFrame  #: text: a row of the table each, as it is written out again
    labels: np.ndarray  #: [rows, labels] bool
    names: tuple[str, ...]
    patients: np.ndarray  #: [rows]
    left_out: int  #: rows of the views with an uncertain label, where such rows are left out


class Columns(NamedTuple):
    """Which columns of a table hold what; `labels` None: all that are left, if they hold labels."""

    labels: Sequence[str] | None = None
    separator: str | None = None  #: `labels` is then one column of names
    patient: str | None = None
    view: str | None = None
    views: Sequence[str] | None = None
    uncertain: str = "positive-only"


def read_pool(path: Path, columns: Columns) -> Pool:
    """The rows of a CSV, Parquet or JSON Lines file, of a NumPy array, or of a CSV file that is 0 and 1 throughout.

    Raises:
        FileNotFoundError, ValueError: naming the file, and row and column where there is one.
    """
    if path.suffix.lower() == ".npy":
        return _matrix(path, _load(path), columns)
    if path.name.lower().endswith(ENDINGS[:2]) and _without_header(path):
        return _matrix(path, pd.read_csv(path, header=None).to_numpy(), columns)
    frame, rows = read_text_table(path, [name for name in (columns.patient, columns.view) if name is not None])
    if columns.views is not None and columns.view is None:
        raise ValueError("views need to know in which column they stand: give --view COLUMN")
    keep = chosen(frame, columns.view, None if columns.views is None else tuple(columns.views), path)
    frame, rows = frame[keep], rows[keep]
    labels = read_labels(_labels(frame, columns, path), frame, rows, path)
    certain = ~labels.ignored.any(1)
    patients = (
        np.arange(len(frame)) if columns.patient is None else filled(frame, columns.patient, rows, path).to_numpy(str)
    )
    return Pool(
        frame[certain].reset_index(drop=True),
        labels.positive[certain],
        labels.schema.labels,
        patients[certain],
        int((~certain).sum()),
    )


def pool_of(films: Films) -> Pool:
    """The films of a source, which has read labels, views and uncertain values by its own settings."""
    labels, names = films.label_matrix(), films.schema.labels
    frame = pd.DataFrame({"id": films.ids(), "patient": films.patients()})
    frame = frame.join(pd.DataFrame(labels.astype(int), columns=list(names)).astype(str))
    return Pool(frame, labels, names, films.patients().astype(str), len(films.skipped))


def _labels(frame: pd.DataFrame, columns: Columns, path: Path) -> Labels:
    if columns.separator is not None:
        if columns.labels is None or len(columns.labels) != 1:
            raise ValueError("--separator is for one column of names: give it as --labels COLUMN")
        missing = [name for name in columns.labels if name not in frame]
        if not missing:
            return Labels(column=columns.labels[0], separator=columns.separator)
    elif columns.labels is not None:
        missing = [name for name in columns.labels if name not in frame]
        if not missing:
            return Labels(columns=tuple(columns.labels), uncertain=columns.uncertain)
    else:
        missing = []
    others = [name for name in frame if name not in (columns.patient, columns.view)]
    of_labels = [name for name in others if frame[name].isin(list(VALUES)).all() and (frame[name] != "").any()]
    if not missing and others and of_labels == others:
        return Labels(columns=tuple(others), uncertain=columns.uncertain)
    what = f"no column {missing[0]!r}" if missing else "which columns are labels is not said: give --labels A,B"
    raise ValueError(
        f"{path}: {what}; columns that hold only 1, 0, -1 and blanks: {', '.join(of_labels) or 'none'}; all columns: "
        f"{', '.join(frame)}"
    )


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"no file {path}") from None
    except (ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path} as a NumPy array: {error}") from error


def _without_header(path: Path) -> bool:
    first = (
        pd.read_csv(path, header=None, nrows=1, dtype=str, keep_default_na=False) if path.is_file() else pd.DataFrame()
    )
    return bool(first.size) and bool(first.isin(["0", "1"]).all(axis=None))


def _matrix(path: Path, matrix: np.ndarray, columns: Columns) -> Pool:
    if given := [name for name in ("patient", "view", "views", "separator") if getattr(columns, name) is not None]:
        raise ValueError(
            f"{path} is a matrix of labels without columns' names: --{given[0]} is for tables that have them"
        )
    if matrix.ndim != 2 or not np.isin(matrix, (0, 1)).all():
        raise ValueError(f"{path}: expected 0 and 1 in rows and columns, found {matrix.dtype} {list(matrix.shape)}")
    names = tuple(columns.labels or map(str, range(matrix.shape[1])))
    if len(names) != matrix.shape[1]:
        raise ValueError(f"{path} has {matrix.shape[1]} columns, --labels names {len(names)}")
    rows = np.arange(len(matrix))
    frame = pd.DataFrame(matrix.astype(int).astype(str), columns=list(names))
    frame.insert(0, "row", rows.astype(str), allow_duplicates=True)
    return Pool(frame, matrix.astype(bool), names, rows, 0)
