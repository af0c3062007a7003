"""Greedy answers of base, SFT and GRPO on every evaluation set, scored in-schema and through a label map."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vlmalign.data.sources.schema import CHEXPERT9
from vlmalign.evaluation.baselines import BASELINES
from vlmalign.evaluation.bootstrap import paired_difference
from vlmalign.evaluation.f1 import label_matrix
from vlmalign.evaluation.results import evaluate_predictions, read_predictions, write_predictions
from vlmalign.exchange import from_first, own_share
from vlmalign.progress import Progress
from vlmalign.rewards.parse import parse_completion
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.studies.chexreason.films import LabelledFilms, draw_patients, open_films
from vlmalign.studies.chexreason.system import System

Row = dict[str, Any]


@dataclass(frozen=True)
class TestSet:
    """Films to be scored on, in the names of `labels`; a model answers in the names it was trained on."""

    name: str
    role: str  #: "in-schema" or "cross-schema"
    films: LabelledFilms
    rows: np.ndarray

    @property
    def labels(self) -> tuple[str, ...]:
        return self.films.labels

    def subsets(self) -> dict[str, tuple[str, ...]]:
        """Averages over different label sets cannot be compared: all labels, and the nine NIH shares with CheXpert."""
        everything = {f"all {len(self.labels)}": self.labels}
        if set(CHEXPERT9.labels) < set(self.labels):
            return everything | {"shared 9": CHEXPERT9.labels}
        return everything


def open_test_sets(config: ChexReasonConfig, films: LabelledFilms, held_out: np.ndarray) -> list[TestSet]:
    """The held-out films of the training source, if there are any, and the sets of the config."""
    found = []
    if len(held_out):
        found.append(TestSet(f"{config.data.train.name} (held out)", "in-schema", films, held_out))
    for item in config.evaluation.sets:
        other = open_films(item.films, config)
        if item.role == "in-schema" and other.labels != films.labels:
            raise ValueError(
                f"evaluation set {item.films.name} has labels {', '.join(other.labels)}, the training set others; "
                "give it a label_map and role cross-schema"
            )
        count = len(other) if item.limit is None else min(item.limit, len(other))
        found.append(TestSet(item.films.name, item.role, other, draw_patients(other.patients, count, seed=config.seed)))
    return found


def predict(
    config: ChexReasonConfig,
    system: System,
    stage: str,
    params: Mapping[str, Array],
    test: TestSet,
    vocabulary: Sequence[str],
    progress: Progress,
) -> list[Row]:
    """One prediction row per film, read back if an earlier start of this run already wrote them."""
    path = config.run / "evaluation" / "parts" / f"{stage}-{test.name.replace('/', '_')}.jsonl"
    written = from_first(lambda: read_predictions(path) if path.exists() else None)
    if written is not None:
        return written
    examples = [test.films.example(int(row)) for row in test.rows]
    prompts = [system.question(example, int(row)) for example, row in zip(examples, test.rows, strict=True)]
    generator = system.generator(
        prompts,
        rows=config.evaluation.rows,
        group=1,
        completion=config.evaluation.completion,
        multiple=config.evaluation.prompt_multiple,
        sampling=Sampling(temperature=0.0),
    )
    progress.stage(f"answer {test.name}, {stage}", max(1, len(own_share(prompts))))
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress.update(done)

    answers = system.answer(generator, params, prompts, seed=config.seed, advance=advance)
    rows = []
    for example, (answer, text) in zip(examples, answers, strict=True):
        parsed = parse_completion(text, tuple(vocabulary))
        rows.append(
            {
                "stage": stage,
                "dataset": test.name,
                "id": example.id,
                "patient": example.patient,
                "truth": list(example.labels),
                "predicted": [label for label in test.labels if label in parsed.predicted],
                "valid": parsed.valid,
                "reason": parsed.reason,
                "reasoning": parsed.reasoning,
                "completion": text,
                "tokens": len(answer.tokens),
                "stopped": answer.stopped,
                "image": _film_path(config.run, example.image),
            }
        )
    from_first(lambda: _keep(path, rows))
    return rows


def _keep(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(path, rows)


def _film_path(run: Path, image: Path) -> str:
    """Relative to the run folder where the film lies in it, so that the folder can be moved; else absolute."""
    image, run = image.resolve(), run.resolve()
    return str(image.relative_to(run)) if image.is_relative_to(run) else str(image)


def evaluate(
    config: ChexReasonConfig,
    system: System,
    films: LabelledFilms,
    tests: Sequence[TestSet],
    stages: Mapping[str, Mapping[str, Array] | None],
    progress: Progress,
) -> dict[str, Any]:
    """Answers of every stage on every set; writes `predictions.jsonl` and `results.json` and returns the latter.

    `stages` maps a name to its adapter, None for the base model.
    """
    rows: dict[tuple[str, str], list[Row]] = {}
    for stage, adapter in stages.items():
        params = system.policy(adapter)
        for test in tests:
            rows[stage, test.name] = predict(config, system, stage, params, test, films.labels, progress)
        jax.block_until_ready(params)
        del params
    return from_first(lambda: _write_results(config, films, tests, list(stages), rows))


def _write_results(
    config: ChexReasonConfig,
    films: LabelledFilms,
    tests: Sequence[TestSet],
    stages: Sequence[str],
    rows: Mapping[tuple[str, str], list[Row]],
) -> dict[str, Any]:
    folder = config.run / "evaluation"
    write_predictions(folder / "predictions.jsonl", [row for part in rows.values() for row in part])
    results = {
        "datasets": [
            {
                "name": test.name,
                "role": test.role,
                "labels": list(test.labels),
                "n": len(test.rows),
                "patients": len(np.unique(test.films.patients[test.rows])),
            }
            for test in tests
        ],
        "results": [
            {"stage": stage, "dataset": test.name, "results": _score(config, rows[stage, test.name], test)}
            for test in tests
            for stage in stages
        ],
        "baselines": [row for test in tests for row in _baselines(config, films, test, rows["base", test.name])],
        "differences": [
            row
            for test in tests
            for first, second in (("base", "sft"), ("sft", "grpo"))
            for row in _differences(config, test, first, second, rows)
        ],
        "reward": reward_gain(config.run / "grpo" / "metrics.jsonl"),
    }
    path = folder / "results.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return results


def _score(config: ChexReasonConfig, rows: Sequence[Row], test: TestSet) -> Any:
    return evaluate_predictions(
        rows, test.labels, subsets=test.subsets(), draws=config.evaluation.draws, seed=config.seed
    )


def _baselines(config: ChexReasonConfig, films: LabelledFilms, test: TestSet, rows: Sequence[Row]) -> list[Row]:
    """The trivial baselines, fitted on the whole training source in its own names, on one test set."""
    columns = [films.labels.index(label) for label in test.labels]
    known = np.ones(len(films), bool)
    if films is test.films:
        known[test.rows] = False
    found = []
    for name, baseline in BASELINES.items():
        predicted = baseline(films.matrix[known], len(rows), seed=config.seed)[:, columns]
        answers = [
            {**row, "predicted": [label for label, hit in zip(test.labels, hits, strict=True) if hit], "valid": True}
            for row, hits in zip(rows, predicted, strict=True)
        ]
        found.append({"name": name, "dataset": test.name, "results": _score(config, answers, test)})
    return found


def _differences(
    config: ChexReasonConfig, test: TestSet, first: str, second: str, rows: Mapping[tuple[str, str], list[Row]]
) -> list[Row]:
    before, after = rows[first, test.name], rows[second, test.name]
    patients = [row["patient"] for row in before]
    found = []
    for subset, labels in test.subsets().items():
        truth, one, two = (
            label_matrix([[label for label in row[key] if label in labels] for row in part], labels)
            for part, key in ((before, "truth"), (before, "predicted"), (after, "predicted"))
        )
        gap = paired_difference(truth, one, two, patients, draws=config.evaluation.draws, seed=config.seed)
        found.append(
            {
                "dataset": test.name,
                "from": first,
                "to": second,
                "subset": subset,
                "macro": gap.macro._asdict(),
                "micro": gap.micro._asdict(),
            }
        )
    return found


def reward_gain(metrics: Path) -> dict[str, Any]:
    """Mean reward of the first and the last 20 % of GRPO steps, and their difference in standard errors.

    Steps are taken as independent draws: SE = sqrt(s1^2 / n1 + s2^2 / n2), s the standard deviation over steps.
    """
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    # Only the first update on a rollout has its rewards.
    known = np.array([line["reward"] for line in lines if line.get("reward") is not None])
    count = max(2, len(known) // 5)
    parts = {}
    for name, part in (("first", known[:count]), ("last", known[-count:])):
        error = float(part.std(ddof=1) / np.sqrt(len(part)))
        parts[name] = {"mean": float(part.mean()), "standard_error": error, "steps": len(part)}
    gain = parts["last"]["mean"] - parts["first"]["mean"]
    error = float(np.hypot(parts["first"]["standard_error"], parts["last"]["standard_error"]))
    return {**parts, "gain": gain, "gain_in_standard_errors": gain / error if error else None}
