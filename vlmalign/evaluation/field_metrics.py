"""Scores of structured answers, field by field: accuracy, macro-F1, distance, exact and partial match, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmalign.evaluation.bootstrap import bootstrap_f1, bootstrap_ratio
from vlmalign.tasks.field_kinds import AnyField, ListField, NumberField, OrdinalField, SingleField
from vlmalign.tasks.fields import FieldsTask

Row = Mapping[str, Any]


def score_fields(task: FieldsTask, rows: Sequence[Row], **bootstrap: Any) -> dict[str, Any]:
    """`accuracy`: of all fields together; `all_right`: share of answers with every field right; and `fields`: each
    field's scores. A field counts where its truth is known; one that is not given or cannot be read is wrong."""
    patients = [row["patient"] for row in rows]
    right = {name: [right_value(field, *_pair(row, name)) for row in rows] for name, field in task.fields.items()}
    by_row = [[found for found in answer if found is not None] for answer in zip(*right.values(), strict=True)]
    return {
        "accuracy": bootstrap_ratio(
            [sum(found) for found in by_row], [len(found) for found in by_row], patients, **bootstrap
        )._asdict(),
        "all_right": bootstrap_ratio(
            [bool(found) and all(found) for found in by_row], [bool(found) for found in by_row], patients, **bootstrap
        )._asdict(),
        "fields": {
            name: {"kind": field.kind, **_score_field(field, name, rows, right[name], bootstrap)}
            for name, field in task.fields.items()
        },
    }


def field_numbers(task: FieldsTask, rows: Sequence[Row]) -> dict[str, float | None]:
    """Share of right values, over all fields and of each: "accuracy", "accuracy/NAME"; None where no truth is known."""
    found: dict[str, float | None] = {}
    known: list[bool] = []
    for name, field in task.fields.items():
        right = [value for row in rows if (value := right_value(field, *_pair(row, name))) is not None]
        found[f"accuracy/{name}"] = sum(right) / len(right) if right else None
        known += right
    return {"accuracy": sum(known) / len(known) if known else None, **found}


def right_value(field: AnyField, truth: Any, value: Any) -> bool | None:
    """Whether a value is right; None where the truth is not known. Lists must agree as sets."""
    if truth is None:
        return None
    if value is None:
        return False
    if isinstance(field, NumberField):
        return field.agrees(value, truth)
    return set(value) == set(truth) if isinstance(field, ListField) else value == truth


def _pair(row: Row, name: str) -> tuple[Any, Any]:
    return row["truth"][name], row["predicted"][name]


def _score_field(
    field: AnyField, name: str, rows: Sequence[Row], right: Sequence[bool | None], bootstrap: Mapping[str, Any]
) -> dict[str, Any]:
    known = [(row["patient"], *_pair(row, name), hit) for row, hit in zip(rows, right, strict=True) if hit is not None]
    if not known:
        return {"n": 0, "accuracy": None}
    patients, truth, values, hits = map(list, zip(*known, strict=True))

    def mean(numbers: Sequence[float | None]) -> dict[str, Any]:
        counts = [number is not None for number in numbers]
        return bootstrap_ratio([number or 0.0 for number in numbers], counts, patients, **bootstrap)._asdict()

    found: dict[str, Any] = {"n": len(known), "missing": sum(value is None for value in values), "accuracy": mean(hits)}
    if isinstance(field, SingleField | OrdinalField):
        one_hot = [
            np.array([[value == option for option in field.options] for value in side], bool)
            for side in (truth, values)
        ]
        scores = bootstrap_f1(*one_hot, patients, **bootstrap)
        found["macro_f1"] = scores.macro._asdict()
        found["per_option"] = [
            {"option": option, "support": int(count), "f1": score._asdict()}
            for option, count, score in zip(field.options, one_hot[0].sum(axis=0), scores.label, strict=True)
        ]
    if isinstance(field, OrdinalField):
        far = [None if value is None else field.steps(value, true) for value, true in zip(values, truth, strict=True)]
        found["within_one"] = mean([steps is not None and steps <= 1 for steps in far])
        found["mean_steps"] = mean(far)  # over the values that were given
    if isinstance(field, NumberField):
        gaps = [None if value is None else abs(value - true) for value, true in zip(values, truth, strict=True)]
        found["mean_absolute_error"] = mean(gaps)  # over the values that were given
    if isinstance(field, ListField):
        # Accuracy is the exact match. Partial: one name in common, or both empty. Overlap: F1 of the two sets.
        sets = [(set(true), None if value is None else set(value)) for value, true in zip(values, truth, strict=True)]
        found["partial"] = mean([value is not None and (bool(true & value) or true == value) for true, value in sets])
        found["overlap"] = mean([0.0 if value is None else _set_f1(true, value) for true, value in sets])
    return found


def _set_f1(first: set[str], second: set[str]) -> float:
    total = len(first) + len(second)
    return 2 * len(first & second) / total if total else 1.0
