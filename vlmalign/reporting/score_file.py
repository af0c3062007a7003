"""Reads `results.json`: what was scored on each data set, checked, stages in their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmalign.reporting.json_files import read_object
from vlmalign.reporting.json_shape import NUMBER, Maybe, Values, check_shape
from vlmalign.reporting.record import Row, Scores

INTERVAL = {"value": Maybe(NUMBER), "low": Maybe(NUMBER), "high": Maybe(NUMBER)}
BLOCK = {
    "labels": [str],
    "exact_match": NUMBER,
    **dict.fromkeys(("micro", "macro", "macro_all"), INTERVAL),
    "macro_labels": int,
    "per_label": [{"label": str, "support": int, "f1": INTERVAL}],
}
#: scores of label lists, one block per set of labels
LABELS = {"n": int, "patients": int, "fail_rate": NUMBER, "draws": int, "level": NUMBER, "blocks": Values(BLOCK)}
#: of every kind of task; of other kinds than labels, every object with a "value" is a score
RESULTS = {"n": int}
#: of a label's difference, and of how p-values were adjusted; older files have neither
LABEL_DIFFERENCE = {"label": str, "support": int, "f1": INTERVAL}
TESTS = {"correction": str, "families": Values(int), "smallest_p": NUMBER, "fewest_positives": int}
#: over the seeds of siblings: mean, t interval and each seed's value, by the name of the number
OVER_SEEDS = {
    "dataset": str,
    "subset": Maybe(str),
    "numbers": Values({**INTERVAL, "n": int, "seeds": Values(Maybe(NUMBER))}),
}
SEEDS = {"results": [{"stage": str, **OVER_SEEDS}], "differences": [{"from": str, "to": str, **OVER_SEEDS}]}
SUBGROUP = {"stage": str, "dataset": str, "column": str, "group": str, "results": dict}
#: of several samples of each case
SAMPLES = {
    "n": int,
    "fail_rate": NUMBER,
    "pass_at_k": [{"k": int, **INTERVAL}],
    "probability": str,
    "blocks": Values(
        {
            "macro_auroc": INTERVAL,
            "macro_labels": int,
            "ece": Maybe(NUMBER),
            "bins": [{"n": int, "mean": NUMBER, "share": INTERVAL}],
            "per_label": [{"label": str, "support": int, "auroc": INTERVAL, "ece": Maybe(NUMBER)}],
        }
    ),
}
UNKNOWN = [{"name": str, "count": int}]
DATASET = {"name": str, "role": Maybe(str), "n": int}
#: of a data set whose labels were mapped: what has no counterpart -> cases; and cases that have nothing else
UNMAPPED = {"unmapped": Values(int), "only_unmapped": int}
DIFFERENCE = {"dataset": str, "from": str, "to": str, "subset": str, "macro": INTERVAL, "micro": INTERVAL}


def read_scores(path: Path) -> Scores | None:
    """The scores of a `results.json`; None where there is none. Raises ValueError for an entry that does not fit."""
    found = read_object(path, {"datasets": [DATASET], "results": [{"stage": str, "dataset": str, "results": dict}]})
    if found is None:
        return None
    baselines, differences = found.get("baselines") or [], found.get("differences") or []
    for dataset in found["datasets"]:
        if "unmapped" in dataset:
            check_shape(dataset, UNMAPPED, f"{path}, datasets, {dataset['name']}")
    check_shape(baselines, [{"name": str, "dataset": str, "results": dict}], f"{path}, baselines")
    tests, subgroups = found.get("tests") or {}, found.get("subgroups") or []
    check_shape(differences, [DIFFERENCE], f"{path}, differences")
    check_shape([row.get("labels", []) for row in differences], [[LABEL_DIFFERENCE]], f"{path}, differences, labels")
    check_shape(subgroups, [SUBGROUP], f"{path}, subgroups")
    for row in subgroups:
        _check_results(row["results"], f"{path}, subgroups, {row['column']} {row['group']}")
    check_shape(tests, TESTS if tests else {}, f"{path}, tests")
    seeds = found.get("seeds") or {"results": [], "differences": []}
    check_shape(seeds, SEEDS, f"{path}, seeds")

    names = [dataset["name"] for dataset in found["datasets"]]
    for row in [*found["results"], *baselines, *differences, *subgroups]:
        if row["dataset"] not in names:
            raise ValueError(f"{path}: expected data sets of {names}, found {row['dataset']!r}; list it under datasets")
    order = found.get("stages") or ["base", "sft", "grpo"]
    rows = sorted(found["results"], key=lambda row: order.index(row["stage"]) if row["stage"] in order else len(order))
    return Scores(
        found["datasets"],
        _table(names, rows, "stage", f"{path}, results"),
        _table(names, baselines, "name", f"{path}, baselines"),
        differences,
        tests,
        subgroups,
        seeds,
    )


def numbers(results: Row, prefix: str = "") -> dict[str, Row]:
    """The scores of a task that has no labels, by name; those of a field, or of a kind of constraint, behind its name.

    >>> numbers({"n": 3, "fields": {"grade": {"accuracy": {"value": 0.5, "low": None, "high": None}}}})
    {'grade: accuracy': {'value': 0.5, 'low': None, 'high': None}}
    """
    found: dict[str, Row] = {}
    for name, value in results.items() if "blocks" not in results else ():
        if isinstance(value, dict) and "value" in value:
            found[prefix + name.replace("_", " ")] = value
        elif isinstance(value, dict):
            found |= numbers(value, "" if name in ("fields", "by_kind") else f"{prefix}{name}: ")
        elif name == "share":
            found[f"{prefix}share"] = {"value": value, "low": None, "high": None}
    return found


def _table(names: list[str], rows: list[Row], key: str, where: str) -> dict[str, dict[str, Row]]:
    """data set -> the row's key -> its results"""
    table: dict[str, dict[str, Any]] = {name: {} for name in names}
    for row in rows:
        name, results = row[key], row["results"]
        if name in table[row["dataset"]]:
            raise ValueError(f"{where}: expected {name!r} once per data set, found it twice; drop one")
        _check_results(results, f"{where}, {name} on {row['dataset']}")
        table[row["dataset"]][name] = results
    return table


def _check_results(results: Row, where: str) -> None:
    check_shape(results, LABELS if "blocks" in results else RESULTS, where)
    check_shape(results.get("unknown_names"), Maybe(UNKNOWN), f"{where}, unknown_names")
    check_shape(results.get("samples"), Maybe(SAMPLES), f"{where}, samples")
    for kind, score in numbers(results).items():
        check_shape(score, INTERVAL, f"{where}, {kind}")
