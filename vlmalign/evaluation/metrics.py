"""Prediction rows of any task -> its results, its numbers while training, and the one number for a line of a table.

A prediction row holds "id", "patient", "truth", "predicted", "valid", "unknown", "tokens" and "stopped" at least; what
`truth` and `predicted` are depends on the kind of task (see `tasks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from vlmalign.evaluation.bootstrap import bootstrap_ratio
from vlmalign.evaluation.f1 import Counts, f1_values, label_matrix, none_if_nan, outcomes
from vlmalign.evaluation.field_metrics import field_numbers, score_fields
from vlmalign.evaluation.results import check_rows, evaluate_predictions, unknown_names, unknown_rate
from vlmalign.tasks.choice import ChoiceTask
from vlmalign.tasks.free import FreeTask
from vlmalign.tasks.instructions import InstructionsTask
from vlmalign.tasks.labels import LabelsTask
from vlmalign.tasks.reasoning import Agreement, agreement, together
from vlmalign.tasks.tasks import Task

Row = Mapping[str, Any]
Results = dict[str, Any]


class Headline(NamedTuple):
    """The number that stands for results; `low` and `high` are its interval, None where there is none."""

    name: str
    value: float | None
    low: float | None
    high: float | None


class Metric(NamedTuple):
    """How the answers of one kind of task are scored."""

    score: Callable[..., Results]  #: (task, rows, labels, subsets, **bootstrap) -> what is added to the common results
    numbers: Callable[..., dict[str, float | None]]  #: (task, rows, labels) -> by name
    headline: Callable[[Results], tuple[str, Mapping[str, Any]]]  #: results -> name and interval


def score(
    task: Task,
    rows: Sequence[Row],
    *,
    labels: Sequence[str] | None = None,
    subsets: Mapping[str, tuple[str, ...]] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Results:
    """Results with "kind", "n" (answers), "patients", "fail_rate", the settings of the bootstrap, and the kind's scores,
    each an `Interval` by patients.

    `labels` are the names that truth and predictions of a labels task are told in (None: the task's), `subsets` of them
    get a block each. Raises ValueError naming a row that is not a prediction of this task.
    """
    check_rows(rows, {})
    common = {
        "kind": task.kind,
        "n": len(rows),
        "patients": len({row["patient"] for row in rows}),
        "fail_rate": sum(not row["valid"] for row in rows) / len(rows),
        "unknown_rate": unknown_rate(rows),
        "unknown_names": unknown_names(rows),
        "draws": draws,
        "level": level,
        "seed": seed,
    }
    own = METRICS[task.kind].score(task, rows, labels, subsets, draws=draws, level=level, seed=seed)
    return {**common, **own}


def numbers(task: Task, rows: Sequence[Row], *, labels: Sequence[str] | None = None) -> dict[str, float | None]:
    """Numbers for curves while training, without intervals: "n", "valid", "unknown" (shares of answers), "length" (mean
    tokens of an answer) and the kind's.

    None where a number is undefined. `labels` as in `score`.
    """
    return {
        **METRICS[task.kind].numbers(task, rows, labels),
        "valid": sum(bool(row["valid"]) for row in rows) / len(rows),
        "unknown": unknown_rate(rows),
        "length": sum(row["tokens"] for row in rows) / len(rows),
        "n": len(rows),
    }


def headline(results: Results) -> Headline:
    """The number that stands for results: macro-F1 of the first block, accuracy, prompts followed, or mean length.

    Results without a kind are those of labels.
    """
    name, found = METRICS[results.get("kind", "labels")].headline(results)
    return Headline(name, found["value"], found["low"], found["high"])


def _score_labels(
    task: LabelsTask,
    rows: Sequence[Row],
    labels: Sequence[str] | None,
    subsets: Mapping[str, tuple[str, ...]] | None,
    **bootstrap: Any,
) -> Results:
    names = tuple(labels or task.names)
    found = evaluate_predictions(rows, names, subsets=subsets, **bootstrap)
    normal = task.excludes
    both = sum(normal in row["predicted"] and len(row["predicted"]) > 1 for row in rows)
    agreed = _agreements(task, rows, names)
    return {
        **found,
        "contradiction_rate": None if normal is None else both / len(rows),
        **({"reasoning": _reasoning(agreed, [row["patient"] for row in rows], **bootstrap)} if agreed else {}),
    }


def _reasoning(agreed: Sequence[Agreement], patients: Sequence[str], **bootstrap: Any) -> Results:
    """ "named" and "kept" of `tasks.reasoning`, with intervals."""
    named = bootstrap_ratio([a.named for a in agreed], [a.solution for a in agreed], patients, **bootstrap)
    kept = bootstrap_ratio([a.kept for a in agreed], [a.claimed for a in agreed], patients, **bootstrap)
    return {"named": named._asdict(), "kept": kept._asdict()}


def _agreements(task: LabelsTask, rows: Sequence[Row], names: Sequence[str]) -> list[Agreement]:
    """Of every answer; none where the task asks for no reasoning, or rows hold none, as those of a vote."""
    if task.form != "think" or not all("reasoning" in row for row in rows):
        return []
    return [agreement(row["reasoning"], row["predicted"], names, task.synonyms) for row in rows]


def _label_numbers(task: LabelsTask, rows: Sequence[Row], labels: Sequence[str] | None) -> dict[str, float | None]:
    names = tuple(labels or task.names)
    truth, predicted = (label_matrix([row[key] for row in rows], names) for key in ("truth", "predicted"))
    values = f1_values(Counts(*outcomes(truth, predicted).sum(axis=0)))
    found = {"macro_f1": none_if_nan(values.macro), "micro_f1": none_if_nan(values.micro)}
    if agreed := _agreements(task, rows, names):
        total = together(agreed)
        found |= {"reasoning_named": total.named_share, "reasoning_kept": total.kept_share}
    return found


def _score_choice(
    task: ChoiceTask, rows: Sequence[Row], labels: Sequence[str] | None, subsets: Any, **bootstrap: Any
) -> Results:
    del task, labels, subsets
    known = [row["truth"] is not None for row in rows]
    hits = [has and row["predicted"] == row["truth"] for has, row in zip(known, rows, strict=True)]
    accuracy = bootstrap_ratio(hits, known, [row["patient"] for row in rows], **bootstrap)
    unanswered = sum(row["predicted"] is None for row in rows) / len(rows)
    return {"accuracy": accuracy._asdict(), "unanswered": unanswered}


def _choice_numbers(task: ChoiceTask, rows: Sequence[Row], labels: Sequence[str] | None) -> dict[str, float | None]:
    del task, labels
    hits = [row["predicted"] == row["truth"] for row in rows if row["truth"] is not None]
    return {"accuracy": sum(hits) / len(hits) if hits else None}


def _score_instructions(
    task: InstructionsTask, rows: Sequence[Row], labels: Sequence[str] | None, subsets: Any, **bootstrap: Any
) -> Results:
    """Strict: a prompt is followed if all its constraints are. By kind of constraint a plain share with its n."""
    del task, labels, subsets
    patients = [row["patient"] for row in rows]
    counts = [len(row["predicted"]) for row in rows]
    by_kind: dict[str, list[bool]] = {}
    for row in rows:
        for constraint, held in zip(row["truth"], row["predicted"], strict=True):
            by_kind.setdefault(constraint["kind"], []).append(held)
    prompts = bootstrap_ratio([_followed(row) for row in rows], [n > 0 for n in counts], patients, **bootstrap)
    constraints = bootstrap_ratio([sum(row["predicted"]) for row in rows], counts, patients, **bootstrap)
    return {
        "prompts": prompts._asdict(),
        "constraints": constraints._asdict(),
        "by_kind": {kind: {"n": len(held), "share": sum(held) / len(held)} for kind, held in sorted(by_kind.items())},
    }


def _instruction_numbers(
    task: InstructionsTask, rows: Sequence[Row], labels: Sequence[str] | None
) -> dict[str, float | None]:
    del task, labels
    asked = [row for row in rows if row["predicted"]]
    held = [each for row in asked for each in row["predicted"]]
    return {
        "prompts": sum(map(_followed, asked)) / len(asked) if asked else None,
        "constraints": sum(held) / len(held) if held else None,
    }


def _followed(row: Row) -> bool:
    return bool(row["predicted"]) and all(row["predicted"])


def _score_free(
    task: FreeTask, rows: Sequence[Row], labels: Sequence[str] | None, subsets: Any, **bootstrap: Any
) -> Results:
    del task, labels, subsets
    patients, ones = [row["patient"] for row in rows], [1] * len(rows)
    return {
        "tokens": bootstrap_ratio([row["tokens"] for row in rows], ones, patients, **bootstrap)._asdict(),
        "stopped": bootstrap_ratio([row["stopped"] for row in rows], ones, patients, **bootstrap)._asdict(),
    }


def _free_numbers(task: FreeTask, rows: Sequence[Row], labels: Sequence[str] | None) -> dict[str, float | None]:
    del task, labels
    return {
        "tokens": sum(row["tokens"] for row in rows) / len(rows),
        "stopped": sum(row["stopped"] for row in rows) / len(rows),
    }


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "labels": Metric(
            _score_labels, _label_numbers, lambda found: ("macro-F1", next(iter(found["blocks"].values()))["macro"])
        ),
        "choice": Metric(_score_choice, _choice_numbers, lambda found: ("accuracy", found["accuracy"])),
        "fields": Metric(
            lambda task, rows, labels, subsets, **bootstrap: score_fields(task, rows, **bootstrap),
            lambda task, rows, labels: field_numbers(task, rows),
            lambda found: ("accuracy over fields", found["accuracy"]),
        ),
        "instructions": Metric(
            _score_instructions, _instruction_numbers, lambda found: ("prompts followed", found["prompts"])
        ),
        "free": Metric(_score_free, _free_numbers, lambda found: ("mean tokens", found["tokens"])),
    }
)
