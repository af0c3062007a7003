"""Reads a run folder: what a run wrote, checked, as one record. What is not there yet is None.

    config.yaml  environment.json  timing.jsonl
    data/coverage.json  data/skipped.jsonl
    sft/metrics.jsonl  grpo/metrics.jsonl
    evaluation/predictions.jsonl  evaluation/results.json

Errors name the file and the line (or the entry). They never quote it: it may hold a patient's text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from vlmalign.reporting.json_shape import NUMBER, Maybe, Values, check_shape

STAGES = ("base", "sft", "grpo")  #: the models of a run, in the order they come about
ROLES = ("in-schema", "cross-schema")

INTERVAL = {"value": Maybe(NUMBER), "low": Maybe(NUMBER), "high": Maybe(NUMBER)}
LABEL = {"label": str, "support": int, "f1": INTERVAL}
BLOCK = {
    "labels": [str],
    "exact_match": NUMBER,
    "micro": INTERVAL,
    "macro": INTERVAL,
    "macro_labels": int,
    "macro_all": INTERVAL,
    "per_label": [LABEL],
}
SCORES = {
    "n": int,
    "patients": int,
    "fail_rate": NUMBER,
    "draws": int,
    "level": NUMBER,
    "blocks": Values(BLOCK),
}
DATASET = {"name": str, "role": str, "labels": [str], "n": int, "patients": int}
DIFFERENCE = {"dataset": str, "from": str, "to": str, "subset": str, "macro": INTERVAL, "micro": INTERVAL}
FIFTH = {"mean": Maybe(NUMBER), "standard_error": Maybe(NUMBER), "steps": Maybe(int)}
REWARD = {"first": FIFTH, "last": FIFTH, "gain": Maybe(NUMBER), "gain_in_standard_errors": Maybe(NUMBER)}
PREDICTION = {
    "stage": str,
    "dataset": str,
    "id": str,
    "truth": [str],
    "predicted": [str],
    "valid": bool,
    "reason": Maybe(str),
    "reasoning": str,
    "completion": str,
    "image": str,
}
SET = {"films": int, "patients": int, "counts": Values(int)}
COVERAGE = {"labels": [str], "floor": NUMBER, "sets": Values(SET)}


@dataclass(frozen=True)
class Evaluation:
    """`evaluation/results.json`; scores are as in evaluation/results.py."""

    datasets: list[dict[str, Any]]
    scores: dict[str, dict[str, dict[str, Any]]]  #: data set -> stage -> Results, stages in order
    baselines: dict[str, dict[str, dict[str, Any]]]  #: data set -> name -> Results
    differences: list[dict[str, Any]]
    reward: dict[str, Any] | None  #: first and last fifth of the GRPO steps


@dataclass(frozen=True)
class RunFolder:
    """What a run has written so far; None for a file that is absent or empty."""

    path: Path
    config: str | None
    environment: dict[str, Any] | None
    timing: dict[str, float] | None  #: stage -> seconds, resumed parts added up
    coverage: dict[str, Any] | None
    skipped: list[dict[str, Any]] | None  #: empty when films were drawn and none had to be skipped
    sft: list[dict[str, Any]] | None
    grpo: list[dict[str, Any]] | None
    predictions: list[dict[str, Any]] | None
    evaluation: Evaluation | None


def read_run(run: Path) -> RunFolder:
    """The record of the run folder `run`. Raises ValueError for a malformed file, or if there is no such folder."""
    if not run.is_dir():
        raise ValueError(f"expected a run folder, found none at {run}; give the folder that holds config.yaml")
    coverage = _coverage(run / "data" / "coverage.json")
    skipped = _rows(run / "data" / "skipped.jsonl", {"dataset": str, "id": str, "path": str, "reason": str})
    timing: dict[str, float] = {}
    for row in _rows(run / "timing.jsonl", {"stage": str, "seconds": NUMBER}) or ():
        timing[row["stage"]] = timing.get(row["stage"], 0.0) + row["seconds"]
    return RunFolder(
        path=run,
        config=_config(run / "config.yaml"),
        environment=_object(run / "environment.json", dict),
        timing=timing or None,
        coverage=coverage,
        skipped=[] if skipped is None and coverage is not None else skipped,
        sft=_rows(run / "sft" / "metrics.jsonl", {"step": int}),
        grpo=_rows(run / "grpo" / "metrics.jsonl", {"step": int}),
        predictions=_predictions(run / "evaluation" / "predictions.jsonl"),
        evaluation=_evaluation(run / "evaluation" / "results.json"),
    )


def _config(path: Path) -> str | None:
    """The text as it was written, comments and all, once it is known to be YAML."""
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        yaml.safe_load(text)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, found other bytes; restore the file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: not YAML ({error.problem}); correct the line") from None
    except yaml.YAMLError:
        raise ValueError(f"{path}: not YAML (a character it does not allow); restore the file") from None
    return text.strip() or None


def _coverage(path: Path) -> dict[str, Any] | None:
    coverage = _object(path, COVERAGE)
    for name, drawn in coverage["sets"].items() if coverage else ():
        if wrong := sorted(set(drawn["counts"]) ^ set(coverage["labels"])):
            raise ValueError(
                f"{path}, sets, {name}: expected one count per label, found a difference in {wrong}"
                "; write the file again"
            )
    return coverage


def _predictions(path: Path) -> list[dict[str, Any]] | None:
    rows = _rows(path, PREDICTION)
    for number, row in enumerate(rows or (), start=1):
        _check_stage(row["stage"], f"{path}, line {number}")
    return rows


def _evaluation(path: Path) -> Evaluation | None:
    content = _object(path, {"datasets": [DATASET], "results": [{"stage": str, "dataset": str, "results": SCORES}]})
    if content is None:
        return None
    # Written by later stages than the two above: null, empty or absent until then.
    baselines, differences = content.get("baselines") or [], content.get("differences") or []
    reward = content.get("reward") or None
    check_shape(baselines, [{"name": str, "dataset": str, "results": SCORES}], f"{path}, baselines")
    check_shape(differences, [DIFFERENCE], f"{path}, differences")
    check_shape(reward, Maybe(REWARD), f"{path}, reward")

    names = [dataset["name"] for dataset in content["datasets"]]
    scores: dict[str, dict[str, Any]] = {name: {} for name in names}
    trivial: dict[str, dict[str, Any]] = {name: {} for name in names}
    for dataset in content["datasets"]:
        if dataset["role"] not in ROLES:
            raise ValueError(f"{path}, datasets: expected the role to be one of {ROLES}; write the file again")
    for row in [*content["results"], *baselines, *differences]:
        if row["dataset"] not in names:
            raise ValueError(f"{path}: expected data sets of {names}, found {row['dataset']!r}; list it under datasets")
    # In the order of the stages, whatever order they were written in.
    for row in sorted(content["results"], key=lambda row: _check_stage(row["stage"], f"{path}, results")):
        _put(scores[row["dataset"]], row["stage"], row["results"], f"{path}, results")
    for row in baselines:
        _put(trivial[row["dataset"]], row["name"], row["results"], f"{path}, baselines")
    return Evaluation(content["datasets"], scores, trivial, differences, reward)


def _put(table: dict[str, Any], name: str, results: dict[str, Any], where: str) -> None:
    if name in table:
        raise ValueError(f"{where}: expected {name!r} once per data set, found it twice; drop one")
    table[name] = results


def _check_stage(stage: str, where: str) -> int:
    """The stage's place in STAGES."""
    if stage not in STAGES:
        raise ValueError(f"{where}: expected the stage to be one of {STAGES}, found {stage!r}; write the row again")
    return STAGES.index(stage)


def _object(path: Path, shape: Any) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no file or it is empty."""
    if not path.is_file() or not (content := path.read_bytes().strip()):
        return None
    value = parse_json(content, path, 1)
    check_shape(value, shape, str(path))
    return value


def _rows(path: Path, shape: Any) -> list[dict[str, Any]] | None:
    """The objects of a JSON Lines file, or None if there is no file or no row in it."""
    if not path.is_file():
        return None
    rows = []
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines if lines != [b""] else (), start=1):
        row = parse_json(line, path, number)
        check_shape(row, shape, f"{path}, line {number}")
        rows.append(row)
    return rows or None


def parse_json(content: bytes, path: Path, first_line: int) -> Any:
    """The JSON value in `content`, which begins at line `first_line` of the file at `path`. ValueError names both."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except UnicodeDecodeError:
        line, reason = first_line, "bytes that are not UTF-8"
    except _NotANumber:
        line, reason = first_line, "NaN or an infinity, which JSON has not (write null)"
    except (ValueError, RecursionError):  # Python's own limits
        line, reason = first_line, "a number of thousands of digits, or brackets nested as deep"
    raise ValueError(f"{path}, line {line}: expected JSON, found {reason}; continue the run or restore the file")


class _NotANumber(Exception):
    pass


def _refuse_constant(name: str) -> Any:
    raise _NotANumber(name)
