"""A data set of films with random access: what every reader builds.

The table is held as arrays; a film becomes an `Example` when it is asked for. Paths are checked as text when the
data set is opened and followed (links, existence) when a film is asked for, so opening 377,110 films costs no file
access. Only `on_bad="skip"` looks for every file at opening, since the length depends on it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmalign.data.sources.schema import LabelMap, LabelSchema
from vlmalign.data.sources.tables import inside, stays_inside
from vlmalign.quoting import MOST_OF_LINE, quoted, shown
from vlmalign.types import Example


class Films:
    """`len(films)` films; `films[i]` is an `Example`.

    `skipped` lists the rows that were left out, as {"id", "path", "reason"}: rows without labels or with uncertain ones
    that are ignored and, with `on_bad="skip"`, those whose file is missing or lies outside the root. With `on_bad="error"` the latter raise
    FileNotFoundError or ValueError, naming table row and path, when the film is asked for (a path that leaves the
    root as written: when the data set is opened).
    """

    bits: int = 16  #: that films of 16-bit grey use (`films.depth`)

    def __init__(
        self,
        name: str,
        schema: LabelSchema,
        root: Path,
        *,
        table: Path,
        ids: Iterable[str],
        patients: Iterable[str],
        paths: Iterable[str],
        labels: np.ndarray,
        rows: np.ndarray,
        meta: Mapping[str, Iterable[Any]],
        skipped: Sequence[dict[str, str]] = (),
        on_bad: str = "error",
        files: Sequence[Path] = (),
        wanted: str = "",
        notes: Sequence[str] = (),
        ignored: np.ndarray | None = None,
    ) -> None:
        """`labels`: bool [films, labels]; `rows` (int): line of each film in `table`; `paths`: relative to `root`.

        `ignored`: bool [films, labels], uncertain labels for which a film is left out; `files`: the tables that were read
        (default: `table`); `wanted`: the filter, in words, for the ValueError that is raised when no film is left;
        `notes`: what was taken for granted, for the user to read.
        """
        if on_bad not in ("error", "skip"):
            raise ValueError(f"on_bad must be 'error' or 'skip', found {on_bad!r}")
        self.name, self.schema, self.root, self.table = name, schema, Path(root), Path(table)
        self.files, self.notes = tuple(files) or (self.table,), tuple(notes)
        self.skipped: list[dict[str, str]] = list(skipped)
        #: labels of the source that have no counterpart in these films' names -> bool [films]
        self.unmapped: Mapping[str, np.ndarray] = {}
        self._ids = np.asarray(ids, object)
        self._patients = np.asarray(patients, object)
        self._paths = np.asarray(paths, object)
        self._labels = np.asarray(labels, bool).reshape(len(self._ids), len(schema))
        self._rows = np.asarray(rows, int)
        self._meta = {key: np.asarray(column, object) for key, column in meta.items()}
        self._check_names()
        if ignored is not None:
            names = np.array(schema.labels)
            films = np.flatnonzero(ignored.any(1)).tolist()
            self._leave_out({film: f"uncertain: {', '.join(names[ignored[film]])}" for film in films})
        if on_bad == "skip":
            self._skip_bad()
        for i, path in enumerate(self._paths):
            if not stays_inside(path):
                raise ValueError(f"{self._where(i)}: path {quoted(path)} leaves the data root {self.root}")
        if not len(self):
            of = f" of {wanted}" if wanted else ""
            left_out = (
                f"; {len(self.skipped)} were skipped, the first: {self.skipped[0]['reason']}" if self.skipped else ""
            )
            raise ValueError(f"{self.table}: no film is left{of}{left_out}")

    def in_names_of(self, table: LabelMap) -> Films:
        """The same films with their labels in the target names of `table`, whose source is this schema."""
        assert table.source == self.schema
        matrix = np.zeros((len(self), len(table.target)), bool)
        for label in table.mapping:
            for name in table.images(label):
                matrix[:, table.target.index(name)] |= self._labels[:, self.schema.index(label)]
        films = copy.copy(self)
        films.schema, films._labels = table.target, matrix
        films.unmapped = {label: self._labels[:, self.schema.index(label)] for label in table.unmapped}
        return films

    def with_traces(self, traces: Mapping[str, str], path: Path) -> Films:
        """The same films with `meta["trace"]` where `traces` (id -> text, read from `path`) has one.

        ValueError when it has none for any film: it is another data set's.
        """
        texts = np.array([traces.get(id) for id in self._ids], object)
        if not any(text is not None for text in texts):
            raise ValueError(
                f"{path}: none of its {len(traces)} ids is a film of {self.table} (such as {shown(self._ids[0])})"
            )
        films = copy.copy(self)
        films._meta = {**self._meta, "trace": texts}
        films.files = (*self.files, path)
        return films

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Example:
        if not -len(self) <= i < len(self):
            raise IndexError(f"film {i} of {self.name}: it has {len(self)} films")
        path = self._checked_path(i)
        labels = tuple(label for label, on in zip(self.schema.labels, self._labels[i], strict=True) if on)
        meta = {key: column[i] for key, column in self._meta.items() if column[i] is not None}
        return Example(self._ids[i], self._patients[i], path, labels, meta)

    def label_matrix(self) -> np.ndarray:
        """bool [films, labels] in schema order (a copy)."""
        return self._labels.copy()

    def patients(self) -> np.ndarray:
        """Patient of each film: object array of str [films]."""
        return self._patients.copy()

    def ids(self) -> np.ndarray:
        """Id of each film: object array of str [films]."""
        return self._ids.copy()

    @property
    def columns(self) -> tuple[str, ...]:
        """What is known of films beside their labels: the keys of `meta`."""
        return tuple(self._meta)

    def column(self, name: str) -> np.ndarray:
        """`meta[name]` of each film: object array [films], None where a film has none. No file is looked at."""
        return self._meta[name].copy() if name in self._meta else np.full(len(self), None, object)

    def _where(self, i: int) -> str:
        return f"{self.table}, row {self._rows[i]} (film {shown(self._ids[i])})"

    def _checked_path(self, i: int) -> Path:
        try:
            path = inside(self.root, self._paths[i])
        except ValueError as error:
            raise ValueError(f"{self._where(i)}: {error}") from None
        try:
            found = path.is_file()
        except OSError as error:  # a name that is too long, a folder that may not be looked into
            raise ValueError(f"{self._where(i)}: {quoted(path.name)} cannot be looked for: {error.strerror}") from None
        if not found:
            raise FileNotFoundError(
                f"{self._where(i)}: no file {shown(path, MOST_OF_LINE)}; restore it or open with on_bad='skip'"
            )
        return path

    def _check_names(self) -> None:
        """Every film has an id of its own, and a patient: films of no patient would count as those of one."""
        seen: dict[str, int] = {}
        for i, (id, patient) in enumerate(zip(self._ids, self._patients, strict=True)):
            for what, name in (("id", id), ("patient", patient)):
                if not name.strip():
                    raise ValueError(f"{self._where(i)}: found no {what}, expected text; fill the cell")
            if id in seen:
                raise ValueError(f"{self._where(i)}: the id is repeated, first found in row {self._rows[seen[id]]}")
            seen[id] = i

    def _skip_bad(self) -> None:
        bad = {}
        for i in range(len(self)):
            try:
                self._checked_path(i)
            except (ValueError, FileNotFoundError) as error:
                bad[i] = str(error)
        self._leave_out(bad)

    def _leave_out(self, reasons: Mapping[int, str]) -> None:
        """Drops films, and lists them as skipped: place -> reason."""
        keep = np.ones(len(self), bool)
        for i, reason in reasons.items():
            keep[i] = False
            self.skipped.append({"id": self._ids[i], "path": self._paths[i], "reason": reason})
        self._ids, self._patients, self._paths = self._ids[keep], self._patients[keep], self._paths[keep]
        self._labels, self._rows = self._labels[keep], self._rows[keep]
        self._meta = {key: column[keep] for key, column in self._meta.items()}
