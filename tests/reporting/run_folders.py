"""Run folders as the product writes them: a study that forks into three policies, and both layouts of version 0.1."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmalign.evaluation.comparison import adjust, compare
from vlmalign.evaluation.results import evaluate_predictions

LABELS = ("No Finding", "Cardiomegaly", "Edema", "Pneumonia", "Hernia & Co")
SHARED = ("No Finding", "Edema", "Pneumonia")
DATASETS = {"home": ("in-schema", LABELS), "away": ("cross-schema", SHARED)}
#: stage -> kind, parent, and how well it answers
FORK = {
    "base": ("model", None, 0.3),
    "sft": ("sft", "base", 0.75),
    "grpo-hard": ("grpo", "sft", 0.95),
    "grpo-nuanced": ("grpo", "sft", 0.55),
    "dpo": ("dpo", "sft", 0.76),
}
OLD = {"base": ("model", None, 0.3), "sft": ("sft", "base", 0.75), "grpo": ("grpo", "sft", 0.85)}

Stages = Mapping[str, tuple[str, str | None, float]]


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_study(run: Path, *, films: int = 40, steps: int = 30) -> Path:
    """A finished fork of a study: films and answers of two entries, one of labels and one of options."""
    rng = np.random.default_rng(0)
    run.mkdir(parents=True, exist_ok=True)
    (run / "study.yaml").write_text(
        "run: runs/fork\nseed: 0\nsets:\n  train: {from: films}\n  home: {from: films, role: test}\n"
        "  away: {from: films, role: test, peek: true}\nstages:\n"
        + "".join(
            f"  {name}: {{kind: {kind}, from: {parent or 'null'}}}  # note\n"
            for name, (kind, parent, _) in FORK.items()
        )
        + "answers:\n  findings: {}\n  exam: {}\n",
        encoding="utf-8",
    )
    _write_machine(run, [f"stages/{name}" for name in FORK if name != "base"])
    write_json(run / "sets" / "train" / "coverage.json", _coverage(rng, ("sft", "rl", "test")))
    write_json(run / "sets" / "home" / "coverage.json", _coverage(rng, ("cases",)))
    write_lines(
        run / "sets" / "train" / "skipped.jsonl", [{"id": "film-9", "path": "9.jpg", "reason": "truncated image"}]
    )
    for name, (kind, parent, _) in FORK.items():
        if kind != "model":
            write_stage(run / "stages" / name, kind, parent, rng, steps, gain=0.12 if name == "grpo-hard" else 0.0)
    predictions, results = _scored(run, FORK, rng, films)
    for stage in FORK:
        for dataset in DATASETS:
            rows = [row for row in predictions if (row["stage"], row["dataset"]) == (stage, dataset)]
            write_lines(run / "answers" / "findings" / stage / dataset / "predictions.jsonl", rows)
    write_json(run / "scores" / "findings" / "results.json", results)
    _write_exam(run)
    return run


def write_chexreason(run: Path, *, films: int = 40, steps: int = 30) -> Path:
    """A run folder as `vlmalign chexreason` of version 0.1 left it."""
    rng = np.random.default_rng(0)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("seed: 0\ngrpo:\n  beta: 0.15  # KL\n", encoding="utf-8")
    _write_machine(run, ["sft", "grpo"])
    write_json(run / "data" / "coverage.json", _coverage(rng, ("sft", "rl", "validation")))
    write_lines(run / "data" / "skipped.jsonl", [])
    for kind in ("sft", "grpo"):
        write_lines(run / kind / "metrics.jsonl", metrics(kind, rng, steps))
    predictions, results = _scored(run, OLD, rng, films)
    del results["stages"], results["tests"]
    for row in results["differences"]:  # version 0.1 knew no p-values
        del row["labels"]
        for name in ("macro", "micro"):
            row[name] = {key: value for key, value in row[name].items() if key not in ("p", "p_holm")}
    write_lines(run / "evaluation" / "predictions.jsonl", predictions)
    write_json(run / "evaluation" / "results.json", results)
    return run


def write_align(run: Path, *, steps: int = 30) -> Path:
    """A run folder as `vlmalign align` of version 0.1 left it."""
    rng = np.random.default_rng(0)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text("stages:\n- kind: sft\n- kind: dpo\n- kind: ppo\n", encoding="utf-8")
    _write_machine(run, ["load model", "01-sft", "02-dpo", "03-ppo"])
    for place, kind in enumerate(("sft", "dpo", "ppo"), start=1):
        folder = run / f"{place:02d}-{kind}"
        write_lines(folder / "metrics.jsonl", metrics(kind, rng, steps))
        write_lines(folder / "left_out.jsonl", [])
    write_lines(
        run / "01-sft" / "left_out.jsonl", [{"set": "train", "name": "6", "what": "skipped", "reason": "too long"}]
    )
    return run


def write_stage(
    folder: Path, kind: str, parent: str, rng: np.random.Generator, steps: int = 30, gain: float = 0.12
) -> None:
    """A finished stage of a study, with what it recorded."""
    parents = {"from": {"node": f"stages/{parent}", "id": "0" * 64, "which": "last"}}
    made = {
        "node": f"stages/{folder.name}",
        "kind": kind,
        "format": 1,
        "settings": {},
        "parents": parents,
        "versions": {},
    }
    write_json(folder / "made.json", made)
    write_lines(folder / "metrics.jsonl", metrics(kind, rng, steps, gain))
    if kind in ("grpo", "ppo"):
        write_lines(folder / "completions.jsonl", _completions(rng, steps=min(steps, 4)))


def metrics(kind: str, rng: np.random.Generator, steps: int, gain: float = 0.12) -> list[dict[str, Any]]:
    """What a stage of a kind records, step by step; `gain` is what its reward wins."""
    rows: list[dict[str, Any]] = []
    for step, x in enumerate(np.linspace(0, 1, steps), start=1):
        row: dict[str, Any] = {"step": step, "grad_norm": 1.0, "learning_rate": 1e-5 * (1 - x)}
        noise = rng.normal
        if kind == "sft":
            row["loss"] = row["objective"] = 0.4 + 2.5 * np.exp(-5 * x) + 0.05 * noise()
        elif kind == "dpo":
            row |= {"objective": 0.69 - 0.3 * x, "rewards/accuracies": 0.5 + 0.3 * x, "rewards/margins": 0.4 * x}
        else:
            row |= {
                "reward": 0.45 + gain * x + 0.03 * noise(),
                "valid": min(1.0, 0.93 + 0.06 * x + 0.01 * noise()),
                "jaccard": None if step == 4 else 0.5,
                "length": 34 + 6 * x + noise(),
                "kl": 0.03 * x + 0.002 * abs(noise()),
                "entropy": 0.6 - 0.15 * x + 0.02 * noise(),
                "flat_groups": float(step % 10 < 2) or 0.25,
                "stopped": 1.0,
            }
        if step % 5 == 0:
            row["validation/loss" if kind != "grpo" else "validation/reward"] = 0.9 - 0.3 * x
            row["validation/n"] = 12
        rows.append(row)
    return rows


def _write_machine(run: Path, parts: list[str]) -> None:
    machine = {"python": "3.12", "packages": {"jax": "0.11.0", "grain": None}, "cpu_count": 2, "matmul_gflops": 91.25}
    write_json(run / "environment.json", machine)
    rows = [{"stage": part, "seconds": 40.5} for part in parts]
    write_lines(run / "timing.jsonl", [*rows, {"stage": parts[0], "seconds": 20.0}])


def _coverage(rng: np.random.Generator, parts: tuple[str, ...]) -> dict[str, Any]:
    """A pool and the sets drawn from it; a set called "test" has no film, as when nothing is held out."""
    common = rng.dirichlet(np.full(len(LABELS), 0.8))
    shares = {"sft": 0.06 + 0.5 * common, "rl": 0.06 + 0.45 * common}
    sizes = {"pool": 3000, "sft": 600, "rl": 300, "validation": 200, "cases": 40, "test": 0}
    sets = {
        name: {
            "films": sizes[name],
            "patients": sizes[name] * 9 // 10,
            "counts": {label: int(sizes[name] * shares.get(name, common)[i]) for i, label in enumerate(LABELS)},
        }
        for name in ("pool", *parts)
    }
    return {"labels": list(LABELS), "floor": 0.05, "sets": sets}


def _scored(run: Path, stages: Stages, rng: np.random.Generator, films: int) -> tuple[list[dict], dict[str, Any]]:
    """(predictions, results) of label lists, on two data sets."""
    for number in range(2):
        path = run / "images" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    predictions: list[dict] = []
    results, baselines, differences = [], [], []
    for name, (_, labels) in DATASETS.items():
        truths = [sorted(set(rng.choice(labels[:-1], size=1 + film % 2)), key=labels.index) for film in range(films)]
        subsets = {"all": labels} if labels != LABELS else {"all": labels, "shared": SHARED}
        told = {stage: _answers(rng, stage, skill, name, labels, truths) for stage, (*_, skill) in stages.items()}
        for stage, rows in told.items():
            scores = evaluate_predictions(rows, labels, subsets=subsets, draws=50)
            results.append({"stage": stage, "dataset": name, "results": scores})
            predictions += rows
        for trivial, answer in (("all positive", list(labels)), ("most frequent set", [labels[0]])):
            rows = [row | {"predicted": answer, "valid": True} for row in told["base"]]
            scores = evaluate_predictions(rows, labels, subsets=subsets, draws=50)
            baselines.append({"name": trivial, "dataset": name, "results": scores})
        for stage, (_, parent, _) in stages.items():
            if parent is not None:
                gaps = compare(told[parent], told[stage], {"all": labels}, draws=1000)
                differences += [{"dataset": name, "from": parent, "to": stage, **gap} for gap in gaps]
    datasets = [
        {"name": name, "role": role, "labels": list(labels), "n": films, "patients": -(-films // 2)}
        for name, (role, labels) in DATASETS.items()
    ]
    found = {"datasets": datasets, "stages": list(stages), "results": results, "tests": adjust(differences, draws=1000)}
    return predictions, found | {"baselines": baselines, "differences": differences}


def _answers(rng, stage: str, skill: float, dataset: str, labels: tuple[str, ...], truths) -> list[dict]:
    """Each label is told right with the stage's skill; the last label never occurs."""
    rows = []
    for film, truth in enumerate(truths):
        told = [label for label in labels[:-1] if (label in truth) == (rng.random() < skill or label in truth)]
        told = [label for label in told if label not in truth or rng.random() < 0.4 + 0.6 * skill]
        valid = bool(rng.random() < 0.95)
        text = f"The {'heart is large' if film % 2 else 'lungs are clear'} on film {film}."
        rows.append(
            {
                "stage": stage,
                "dataset": dataset,
                "id": f"film-{film:04d}",
                "patient": f"p{film // 2}",
                "truth": truth,
                "predicted": told if valid else [],
                "valid": valid,
                "unknown": ["Oedema", "Wet lung"][: 1 + film % 2] if stage == "base" and film % 10 < 2 else [],
                "reason": None if valid else "expected one solution block, found none",
                "reasoning": text if valid else "",
                "completion": f"<think>{text}</think><solution>{', '.join(told)}</solution>" if valid else text,
                "tokens": 30,
                "stopped": True,
                "image": f"images/{film % 2}.png",
            }
        )
    return rows


def _write_exam(run: Path) -> None:
    """Four-option questions, without images, answered by two of the stages."""
    rows = []
    for stage, right in (("sft", 5), ("grpo-hard", 8)):
        for number in range(12):
            answer = "B" if number < right else "C"
            row = {"stage": stage, "dataset": "medqa", "id": f"q{number}", "patient": f"q{number}", "truth": "B"}
            row |= {"predicted": answer, "valid": True, "unknown": [], "reason": None, "reasoning": "", "tokens": 1}
            rows.append(row | {"completion": answer, "stopped": True, "image": None})
        write_lines(
            run / "answers" / "exam" / stage / "medqa" / "predictions.jsonl", (r for r in rows if r["stage"] == stage)
        )
    common = {"kind": "choice", "n": 12, "patients": 12, "fail_rate": 0.0, "unanswered": 0.0}
    common |= {"unknown_rate": 0.0, "unknown_names": [], "draws": 50, "level": 0.95}
    results = [
        {"stage": stage, "dataset": "medqa", "results": common | scores}
        for stage, scores in (
            ("sft", {"accuracy": {"value": 0.4167, "low": 0.17, "high": 0.67}}),
            ("grpo-hard", {"accuracy": {"value": 0.6667, "low": 0.42, "high": 0.92}}),
        )
    ]
    datasets = [{"name": "medqa", "role": "in-schema", "labels": [], "n": 12, "patients": 12}]
    content = {"datasets": datasets, "stages": list(FORK), "results": results, "baselines": [], "differences": []}
    write_json(run / "scores" / "exam" / "results.json", content)


def _completions(rng: np.random.Generator, steps: int) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        for prompt in range(3):
            rewards = rng.random(4).round(3) if prompt else np.full(4, 0.5)
            for sample, reward in enumerate(rewards):
                rows.append(
                    {
                        "step": step,
                        "prompt_id": prompt,
                        "sample": sample,
                        "images": ["images/0.png"],
                        "prompt": "Which findings are present?",
                        "completion": f"<think>The heart is large ({sample}).</think><solution>Edema</solution>",
                        "tokens": 24,
                        "stopped": True,
                        "reward": float(reward),
                        "parts": {"valid": 1.0, "jaccard": float(reward)},
                        "advantage": float(reward - rewards.mean()),
                        "columns": {"truth": ["Edema", "Pneumonia"][: 1 + prompt % 2]},
                    }
                )
    return rows
