"""Scores of an answers entry: every stage on every set, beside trivial baselines, with paired differences along the graph.

Of several samples of each case their majority vote is scored, and beside it what the samples themselves tell.

Averages over different label sets cannot be compared, so a set is scored in blocks: all its labels, and those that the
entry's smallest label set shares with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmalign.data.sources.films import Films
from vlmalign.evaluation.baselines import BASELINES
from vlmalign.evaluation.comparison import adjust, compare
from vlmalign.evaluation.metrics import headline, score
from vlmalign.evaluation.over_seeds import over_seeds
from vlmalign.evaluation.samples import majority_vote, score_samples
from vlmalign.evaluation.subgroups import groups_of
from vlmalign.reporting.json_shape import NUMBER, Maybe, check_shape
from vlmalign.studies.engine.answers_config import Answers
from vlmalign.studies.engine.config import StudyConfig, set_ref, stage_ref
from vlmalign.studies.engine.files import read_json, read_numbers, read_rows
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.seeds import families
from vlmalign.studies.engine.sets import Cases
from vlmalign.studies.engine.stage_config import ModelStage, Policy
from vlmalign.tasks.labels import LabelsTask
from vlmalign.tasks.tasks import AnyTask

Row = dict[str, Any]

#: of a set of labels, what is told over seeds
AVERAGES = ("macro", "micro", "jaccard")

#: of `results.json`, what the terminal is told of it
OF_STAGE, OF_BASELINE = ({key: str, "dataset": str, "results": {"n": int}} for key in ("stage", "name"))
HEADLINE = {"value": Maybe(NUMBER), "low": Maybe(NUMBER), "high": Maybe(NUMBER), "fail_rate": Maybe(NUMBER)}
RESULTS = {"datasets": [{"name": str, "role": str}], "results": [OF_STAGE], "baselines": [OF_BASELINE]}


def score_answers(study: Opened, name: str) -> dict[str, Any]:
    """The results of the answers entry `name`, from the prediction rows on disk."""
    config, entry = study.config, study.config.answers[name]
    task = study.task_of_answers(entry, entry.sets[0])
    sets = {ref: study.cases(ref) for ref in entry.sets}
    sampled = {
        (stage, ref): read_rows(config.run / "answers" / name / stage / ref / "predictions.jsonl")
        for stage in entry.stages
        for ref in entry.sets
    }
    rows = {of: voted(each, entry) for of, each in sampled.items()}
    found: dict[str, Any] = {
        "task": task.kind,
        "stages": list(entry.stages),
        "datasets": [_dataset(config, ref, cases, task) for ref, cases in sets.items()],
        "results": [],
        "baselines": [],
        "subgroups": [],
        "differences": [],
        "rewards": {
            n: gain
            for n, s in config.stages.items()
            if isinstance(s, Policy) and (gain := reward_gain(config.run / "stages" / n / "metrics.jsonl"))
        },
    }
    for ref, cases in sets.items():
        options: dict[str, Any] = {"draws": entry.draws, "seed": config.seed}
        if isinstance(task, LabelsTask):
            options |= {"labels": cases.labels, "subsets": subsets(cases.labels, [c.labels for c in sets.values()])}
        for stage in entry.stages:
            results = score(task, rows[stage, ref], **options)
            if entry.samples > 1 or entry.probability == "first-token":
                given = entry.probability == "first-token"
                results["samples"] = score_samples(sampled[stage, ref], **options, given=given)
            found["results"].append({"stage": stage, "dataset": ref, "results": results})
        for column, grouping in entry.subgroups.items():
            groups = groups_of(cases.column(column), grouping)
            for stage in entry.stages:
                found["subgroups"] += _subgroups(
                    task, cases, groups, rows[stage, ref], options, stage=stage, column=column
                )
        if isinstance(task, LabelsTask):
            found["baselines"] += _baselines(task, ref, cases, rows[entry.stages[0], ref], options)
            found["differences"] += [
                {"dataset": ref, "from": first, "to": second, **gap}
                for first, second in steps_of(config, entry.stages)
                for gap in compare(
                    rows[first, ref], rows[second, ref], options["subsets"], draws=entry.draws, seed=config.seed
                )
            ]
    found["tests"] = adjust(found["differences"], draws=entry.draws)
    found["seeds"] = {
        "results": list(_over_seeds(config, entry, found["results"])),
        "differences": list(_differences_over_seeds(config, entry, found["differences"])),
    }
    return found


def voted(rows: list[Row], entry: Answers) -> list[Row]:
    """What is scored: the rows themselves, or of several samples of each case, which are label lists, their vote."""
    return rows if entry.samples == 1 else majority_vote(rows)


def read_results(path: Path) -> dict[str, Any]:
    """The scores in a `results.json`; ValueError, naming file and place, where one lacks the number that stands for it."""
    found = read_json(path, RESULTS)
    for row in [*found["results"], *found["baselines"]]:
        where = f"{path}, {row.get('stage', row.get('name'))} on {row['dataset']}"
        try:
            told = headline(row["results"])
        except (LookupError, TypeError, AttributeError, StopIteration) as error:
            raise ValueError(
                f"{where}: results without the number of their kind ({error!r}); restore the file"
            ) from None
        check_shape(told._asdict() | {"fail_rate": row["results"].get("fail_rate")}, HEADLINE, where)
    return found


def subsets(labels: Sequence[str], others: Sequence[Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """All labels, and where another set has fewer of them, those that both have.

    >>> subsets(("a", "b", "c"), [("a", "b", "c"), ("a", "c")])
    {'all 3': ('a', 'b', 'c'), 'shared 2': ('a', 'c')}
    """
    found = {f"all {len(labels)}": tuple(labels)}
    for other in sorted(others, key=len):
        if set(other) < set(labels):
            found[f"shared {len(other)}"] = tuple(label for label in labels if label in other)
    return found


def steps_of(config: StudyConfig, states: Sequence[str]) -> list[tuple[str, str]]:
    """(before, after) of every one of these states and the nearest of them that it goes back to."""
    found = []
    for ref in states:
        name = stage_ref(ref).name
        while not isinstance(config.stages[name], ModelStage):
            above = config.stages[name].from_
            before = next((other for other in states if other in (above, stage_ref(above).name)), None)
            if before is not None:
                found.append((before, ref))
                break
            name = stage_ref(above).name
    return found


def _over_seeds(config: StudyConfig, entry: Answers, results: Sequence[Row]) -> Iterator[Row]:
    """Of siblings: each number over their seeds, by data set and set of labels (None for tasks without)."""
    by_place = {(row["stage"], row["dataset"]): row["results"] for row in results}
    for family, members in families(config, entry.stages).items():
        for ref in entry.sets:
            own = {seed: by_place[stage, ref] for seed, stage in members.items()}
            first = next(iter(own.values()))
            for subset in first.get("blocks", [None]):
                told = {seed: _averages(each, subset) for seed, each in own.items()}
                yield {
                    "stage": family,
                    "dataset": ref,
                    "subset": subset,
                    "numbers": {
                        name: over_seeds({seed: each[name] for seed, each in told.items()})
                        for name in _averages(first, subset)
                    },
                }


def _averages(results: Row, subset: str | None) -> dict[str, float | None]:
    if subset is None:
        told = headline(results)
        return {told.name: told.value, "not valid": results["fail_rate"]}
    block = results["blocks"][subset]
    return {name: block[name]["value"] for name in AVERAGES} | {"not valid": results["fail_rate"]}


def _differences_over_seeds(config: StudyConfig, entry: Answers, differences: Sequence[Row]) -> Iterator[Row]:
    """The paired differences of siblings and what they go on from, seed by seed."""
    member = {
        ref: (family, seed) for family, own in families(config, entry.stages).items() for seed, ref in own.items()
    }
    found: dict[tuple[str, str, str, str], dict[int, Row]] = {}
    for row in differences:
        if row["to"] in member:
            family, seed = member[row["to"]]
            above = member.get(row["from"], (row["from"], seed))[0]
            found.setdefault((row["dataset"], row["subset"], above, family), {})[seed] = row
    for (ref, subset, above, family), rows in found.items():
        numbers = {name: over_seeds({s: row[name]["value"] for s, row in rows.items()}) for name in AVERAGES}
        yield {"dataset": ref, "subset": subset, "from": above, "to": family, "numbers": numbers}


def _dataset(config: StudyConfig, ref: str, cases: Cases, task: Any) -> dict[str, Any]:
    patients = {row["patient"] for row in cases.rows}
    section = config.sets[set_ref(ref).name]
    # Labels told in other names than the source's own follow another convention, unless the task has just these. Those of
    # a built-in map do so even then, unless a stage is trained on labels that came by it.
    label_map = getattr(config.sources[section.from_], "label_map", None)
    other = isinstance(task, LabelsTask) and label_map is not None and set(cases.labels) != set(task.names)
    if isinstance(task, LabelsTask) and isinstance(label_map, str):
        other = other or label_map not in _maps_of_training(config)
    known: dict[str, Any] = {
        "name": ref,
        "role": "cross-schema" if other else "in-schema",
        "labels": list(cases.labels),
        "n": len(cases),
        "patients": len(patients),
    }
    if isinstance(cases.source, Films) and label_map is not None:
        known |= _unmapped(cases)
    return {**known, "peeked": True} if section.peek else known


def _maps_of_training(config: StudyConfig) -> list[Any]:
    """The label maps of the sources that stages are trained on; None for one without."""
    read = [data for stage in config.trained.values() for data in stage.learns_from.values()]
    sets = [config.sets[set_ref(ref).name] for data in read for ref in data.sets]
    return [getattr(config.sources[each.from_], "label_map", None) for each in sets]


def _unmapped(cases: Cases) -> dict[str, Any]:
    """Labels of the source that the map leaves out, each with its cases, most frequent first; and the cases that have such
    labels alone, so that their true set is empty."""
    dropped = {label: column[cases.places] for label, column in cases.source.unmapped.items()}
    counts = {label: int(column.sum()) for label, column in dropped.items()}
    any_dropped = np.any(list(dropped.values()), axis=0) if dropped else np.zeros(len(cases), bool)
    empty = ~cases.source.label_matrix()[cases.places].any(axis=1)
    return {
        "unmapped": {label: count for label, count in sorted(counts.items(), key=lambda each: -each[1]) if count},
        "only_unmapped": int((any_dropped & empty).sum()),
    }


def _baselines(task: LabelsTask, ref: str, cases: Cases, rows: Sequence[Row], options: Mapping[str, Any]) -> list[Row]:
    """The trivial baselines, fitted on what the source has beside the set, or on all of it where that is nothing."""
    source: Films = cases.source
    known = np.ones(len(source), bool)
    known[cases.places] = False
    matrix = source.label_matrix()[known] if known.any() else source.label_matrix()
    found = []
    for name, baseline in BASELINES.items():
        predicted = baseline(matrix, len(rows), seed=options["seed"])
        answers = [
            {
                **{key: value for key, value in row.items() if key != "reasoning"},
                "predicted": [label for label, hit in zip(cases.labels, hits, strict=True) if hit],
                "valid": True,
                "unknown": [],
            }
            for row, hits in zip(rows, predicted, strict=True)
        ]
        found.append({"name": name, "dataset": ref, "results": score(task, answers, **options)})
    return found


def _subgroups(
    task: AnyTask,
    cases: Cases,
    groups: Mapping[str, Sequence[int]],
    rows: Sequence[Row],
    options: Mapping[str, Any],
    *,
    stage: str,
    column: str,
) -> list[Row]:
    """Scores of each group's cases; one without an answer (a row that was left out) is in none."""
    by_case = {row["id"]: row for row in rows}
    found = []
    for name, places in groups.items():
        own = [by_case[id] for place in places if (id := cases.rows[place]["id"]) in by_case]
        if own:
            where = {"stage": stage, "dataset": cases.name, "column": column, "group": name}
            found.append({**where, "results": score(task, own, **options)})
    return found


def reward_gain(metrics: Path) -> dict[str, Any] | None:
    """Mean reward of the first and the last 20 % of a stage's steps, and their difference in standard errors.

    Steps are taken as independent draws: SE = sqrt(s1^2 / n1 + s2^2 / n2), s the standard deviation over steps. None
    where fewer than two steps have a reward.
    """
    if not metrics.exists():
        return None
    # Only the first update on a rollout has its rewards.
    known = np.array([value for value in read_numbers(metrics, "reward") if value is not None])
    if len(known) < 2:
        return None
    count = max(2, len(known) // 5)
    parts = {}
    for name, part in (("first", known[:count]), ("last", known[-count:])):
        error = float(part.std(ddof=1) / np.sqrt(len(part)))
        parts[name] = {"mean": float(part.mean()), "standard_error": error, "steps": len(part)}
    gain = parts["last"]["mean"] - parts["first"]["mean"]
    error = float(np.hypot(parts["first"]["standard_error"], parts["last"]["standard_error"]))
    return {**parts, "gain": gain, "gain_in_standard_errors": gain / error if error else None}
