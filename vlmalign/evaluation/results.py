"""Prediction rows of labels -> the results of an evaluation, ready for JSON; and the predictions file (JSON Lines).

A prediction row is one answer: `id`, `patient`, `truth` and `predicted` (lists of labels), `valid`, `unknown` (names that
are no labels; may be missing), `sample` where a film is answered several times, and whatever else the caller keeps. *In-schema* evaluation uses the labels the model was trained on; *cross-schema* evaluation uses a reduced
list, to which the caller maps both truth and predictions before calling.

Averages over different label sets cannot be compared. So results come in named blocks, one per label subset: report
all 14 labels and the nine shared ones side by side.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from vlmalign.data.sources.json_lines import parse
from vlmalign.evaluation.bootstrap import bootstrap_f1, bootstrap_ratio
from vlmalign.evaluation.f1 import evaluate, jaccard, label_matrix
from vlmalign.shapes import Bool

Row = Mapping[str, Any]

_JSON_NAMES = {str: "a string", list: "a list", bool: "true or false"}
#: how many of the unknown names results list, and how much of each
_NAMES, _CHARACTERS = 10, 60


class LabelBlock(TypedDict):
    """One label of a block; undefined scores are None."""

    label: str
    support: int
    tp: int
    fp: int
    fn: int
    precision: float | None
    recall: float | None
    f1: dict[str, Any]  #: an `Interval`


class Block(TypedDict):
    """Scores over one label subset; conventions: evaluation/f1.py."""

    labels: list[str]
    exact_match: float  #: of the subset's labels
    jaccard: dict[str, Any]  #: an `Interval`: mean over films of |truth n answer| / |truth u answer|
    micro: dict[str, Any]  #: likewise, as are the two below
    macro: dict[str, Any]
    macro_labels: int  #: labels with support, which `macro` was taken over
    macro_all: dict[str, Any]
    per_label: list[LabelBlock]


class Results(TypedDict):
    """One system on one test set."""

    n: int  #: films
    patients: int
    fail_rate: float  #: share of completions that are not valid
    unknown_rate: float  #: share of completions that name something which is no label
    unknown_names: list[dict[str, Any]]  #: {"name", "count"}: the most frequent of these, by completions
    draws: int
    level: float
    seed: int
    blocks: dict[str, Block]  #: by name of label subset


def evaluate_predictions(
    rows: Sequence[Row],
    labels: tuple[str, ...],
    *,
    subsets: Mapping[str, tuple[str, ...]] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Results:
    """Scores with patient-level intervals, one block per label subset (None: one block, "all", of all `labels`).

    Rows are checked first: every label in `labels` and listed once, no film twice, nothing predicted by an invalid
    completion. A completion of unknown names only is no exact match, not even where the true set is empty. All blocks
    share the same resamples. Raises ValueError naming the row.
    """
    subsets = {"all": labels} if subsets is None else subsets
    check_rows(rows, {"truth": list, "predicted": list})
    _check_labels(rows, labels)
    _check_subsets(subsets, labels)
    truth = label_matrix([row["truth"] for row in rows], labels)
    predicted = label_matrix([row["predicted"] for row in rows], labels)
    valid = np.array([row["valid"] for row in rows], bool)
    says = says_something(rows)
    patients = [row["patient"] for row in rows]

    blocks: dict[str, Block] = {}
    for name, subset in subsets.items():
        columns = [labels.index(label) for label in subset]
        report = evaluate(truth[:, columns], predicted[:, columns], subset, valid=valid, says=says)
        intervals = bootstrap_f1(
            truth[:, columns], predicted[:, columns], patients, draws=draws, level=level, seed=seed
        )
        overlap = jaccard(truth[:, columns], predicted[:, columns], says)
        mean = bootstrap_ratio(overlap.tolist(), [1.0] * len(rows), patients, draws=draws, level=level, seed=seed)
        blocks[name] = Block(
            labels=list(subset),
            exact_match=report.exact_match,
            jaccard=mean._asdict(),
            micro=intervals.micro._asdict(),
            macro=intervals.macro._asdict(),
            macro_labels=report.macro_labels,
            macro_all=intervals.macro_all._asdict(),
            per_label=[
                LabelBlock(**(asdict(score) | {"f1": f1._asdict()}))
                for score, f1 in zip(report.labels, intervals.label, strict=True)
            ],
        )
    return Results(
        n=len(rows),
        patients=len(set(patients)),
        fail_rate=float((~valid).mean()),
        unknown_rate=unknown_rate(rows),
        unknown_names=unknown_names(rows),
        draws=draws,
        level=level,
        seed=seed,
        blocks=blocks,
    )


def says_something(rows: Sequence[Row]) -> Bool[np.ndarray, "film"]:
    """Whether an answer is valid and not of unknown names only, which counts as no answer even where nothing is true."""
    return np.array([row["valid"] and not (row.get("unknown") and not row["predicted"]) for row in rows], bool)


def unknown_rate(rows: Sequence[Row]) -> float:
    """Share of completions that give a name which the task does not know."""
    return sum(bool(row.get("unknown")) for row in rows) / len(rows)


def unknown_names(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The most frequent unknown names, cut to 60 characters, each with the number of completions that give it.

    >>> unknown_names([{"unknown": ["flu", "flu"]}, {"unknown": ["cold", "Flu"]}])
    [{'name': 'flu', 'count': 2}, {'name': 'cold', 'count': 1}]
    """
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(list(dict.fromkeys(name.casefold()[:_CHARACTERS] for name in row.get("unknown", ()))))
    return [{"name": name, "count": count} for name, count in counts.most_common(_NAMES)]


def write_predictions(path: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line, all or nothing: a reader sees the old file or the whole new one.

    The rows go to a temporary file beside `path`, reach the disk, and are renamed over it; an error on the way leaves
    `path` as it was. Raises ValueError for a NaN or infinity, which JSON has not.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a predictions file. Raises ValueError naming the line that is not a JSON object.

    The message never quotes the line: it may hold a patient's text.
    """
    rows = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                rows.append(parse(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}; write the file again") from None
    return rows


def check_rows(rows: Sequence[Row], fields: Mapping[str, type]) -> None:
    """Raises ValueError, naming the row, where there is none, where one lacks id, patient, valid or one of `fields` of its
    type, and where an answer is there twice."""
    if not rows:
        raise ValueError("expected at least one prediction row, found none; check the predictions file")
    seen: dict[Any, int] = {}
    for number, row in enumerate(rows, start=1):
        where = _where(number, row)
        for field, kind in {"id": str, "patient": str, **fields, "valid": bool}.items():
            if not isinstance(row.get(field), kind):
                found = type(row[field]).__name__ if field in row else "no such field"
                raise ValueError(
                    f"{where}: expected {field} to be {_JSON_NAMES[kind]}, found {found}; write the row again"
                )
        key = row["id"], row.get("sample")
        if key in seen:
            raise ValueError(f"{where}: expected every film once, found it in row {seen[key]} too; drop one")
        seen[key] = number


def _where(number: int, row: Row) -> str:
    return f"row {number} (id {row.get('id')!r})"


def _check_labels(rows: Sequence[Row], labels: tuple[str, ...]) -> None:
    for number, row in enumerate(rows, start=1):
        where = _where(number, row)
        for field in ("truth", "predicted"):
            names = row[field]
            if unlisted := sorted(set(names) - set(labels)):
                raise ValueError(
                    f"{where}: expected {field} among {labels}, found {unlisted}; map them to this schema first"
                )
            if len(set(names)) < len(names):
                raise ValueError(f"{where}: expected each label of {field} once, found {names}; drop the repeats")
        if row["predicted"] and not row["valid"]:
            raise ValueError(
                f"{where}: expected an invalid completion to predict nothing, found {row['predicted']}; write []"
            )


def _check_subsets(subsets: Mapping[str, tuple[str, ...]], labels: tuple[str, ...]) -> None:
    for name, subset in subsets.items():
        unlisted = sorted(set(subset) - set(labels))
        if unlisted or not subset or len(set(subset)) < len(subset):
            raise ValueError(
                f"expected subset {name!r} to hold labels of {labels}, each once and at least one, found {subset}"
                "; correct the subset"
            )
