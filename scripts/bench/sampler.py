"""The balanced sampler: seconds on a table of MIMIC-CXR's size, gap to the optimum, balance beside other ways to draw.

    python scripts/bench/sampler.py
    python scripts/bench/sampler.py --labels labels.csv --patient "Patient ID" --labels-in "Finding Labels"
    python scripts/bench/sampler.py --out scripts/bench/results/sampler.json

Prints a table and one JSON object. Three questions:

    speed     2,000 films from 377,110 rows of 14 labels and 65,379 patients (the numbers of films and patients of
              MIMIC-CXR-JPG, arXiv 1901.07042); the labels are drawn at random, with prevalences from .5 to 30 %.
    gap       60 films, 14 labels, 12 picks, 200 tables: the objective beside its minimum, which
              `scipy.optimize.milp` proves; as a share of max(minimum, 1), since the minimum may be 0.
    balance   of 2,000 films: beside a random draw and iterative stratification (Sechidis et al. 2011), which both keep the source's
              prevalences on purpose.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from scipy.optimize import Bounds, LinearConstraint, milp

from vlmalign.data.sampling.sampler import balanced_sample, random_sample
from vlmalign.data.sampling.search import Goal
from vlmalign.data.sampling.stratification import stratify

FILMS, PATIENTS, LABELS, DRAWN = 377_110, 65_379, 14, 2000
#: the stratifier's time grows with films x labels
STRATIFIED_FROM = 40_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=Path, help="a label table of one's own, as CSV, for speed and balance")
    parser.add_argument("--labels-in", default="Finding Labels", help="its column of labels, joined by |")
    parser.add_argument("--patient", default="Patient ID", help="its column of patients")
    parser.add_argument("--instances", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.labels is None:
        labels, patients = drawn_table(np.random.default_rng(0))
    else:
        labels, patients = read_table(arguments.labels, arguments.labels_in, arguments.patient)
    result = {
        "versions": {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "pandas")}
        | {"python": platform.python_version(), "cores": os.cpu_count()},
        "table": "drawn at random" if arguments.labels is None else arguments.labels.name,
        "speed": speed(labels, patients, arguments.repeats),
        "gap": {
            "one label per film": gaps(arguments.instances, 1 / LABELS),
            "default target": gaps(arguments.instances, None),
        },
        "balance": balance(labels, patients),
    }
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    show(result)


def drawn_table(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Labels [films, labels] of uneven prevalence, and patients [films]."""
    prevalence = np.geomspace(0.005, 0.3, LABELS)
    # What a film is like moves all its labels together: findings come in company.
    illness = rng.gamma(1.0, 1.0, (FILMS, 1))
    return rng.random((FILMS, LABELS)) < np.minimum(prevalence * illness, 0.9), rng.integers(0, PATIENTS, FILMS)


def read_table(path: Path, column: str, patient: str) -> tuple[np.ndarray, np.ndarray]:
    table = pd.read_csv(path, usecols=[column, patient])
    found = table[column].str.get_dummies("|").astype(bool)
    return found.drop(columns="No Finding", errors="ignore").to_numpy(), table[patient].to_numpy()


def names(labels: np.ndarray) -> list[str]:
    return [f"label {i}" for i in range(labels.shape[1])]


def speed(labels: np.ndarray, patients: np.ndarray, repeats: int) -> dict:
    """Seconds of wall time and of processor time."""
    wall, cpu = [], []
    for seed in range(repeats):
        began, used = time.perf_counter(), time.process_time()
        balanced_sample(labels, patients, names(labels), sizes={"sft": DRAWN}, seed=seed)
        wall.append(time.perf_counter() - began)
        cpu.append(time.process_time() - used)
    return {
        "films": len(labels),
        "patients": len(np.unique(patients)),
        "labels": labels.shape[1],
        "drawn": DRAWN,
        "wall_s": statistics.median(wall),
        "cpu_s": statistics.median(cpu),
        "all_wall_s": wall,
    }


def gaps(instances: int, target: float | None) -> dict:
    """How far from the minimum."""
    found = []
    for seed in range(instances):
        rng = np.random.default_rng(seed)
        labels = rng.random((60, LABELS)) < rng.uniform(0.03, 0.3, LABELS)
        labels[np.flatnonzero(~labels.any(1)), rng.integers(LABELS)] = True
        for empty in np.flatnonzero(~labels.any(0)):
            labels[rng.integers(60), empty] = True
        drawn = balanced_sample(labels, range(60), names(labels), sizes={"s": 12}, seed=seed, target=target).sets["s"]
        best = minimum(labels, drawn.goal)
        assert drawn.objective >= best
        found.append((drawn.objective - best) / max(best, 1))
    return {
        "instances": instances,
        "median": float(np.median(found)),
        "mean": float(np.mean(found)),
        "worst": float(max(found)),
        "at_the_minimum": float(np.mean(np.array(found) == 0)),
    }


def minimum(labels: np.ndarray, goal: Goal) -> int:
    """The least objective of any pick, as a mixed-integer linear program.

    The objective is convex in each count, so one variable per label and step of its count, priced at the step's
    marginal cost, is taken in order by any minimum.
    """
    films, width = labels.shape
    steps = goal.marginal()[: goal.size]  # [size, labels]
    cost = np.concatenate([np.zeros(films), steps.T.ravel()])
    counts = np.hstack([labels.T, -np.kron(np.eye(width), np.ones(goal.size))])
    size = np.concatenate([np.ones(films), np.zeros(steps.size)])
    equal = np.concatenate([np.zeros(width), [goal.size]])
    solved = milp(
        cost,
        constraints=LinearConstraint(np.vstack([counts, size]), equal, equal),
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0},
    )
    if not solved.success:
        raise RuntimeError(f"the solver did not prove a minimum: {solved.message}")
    return round(solved.fun) + goal.objective(np.zeros(width, np.int64))


def balance(labels: np.ndarray, patients: np.ndarray) -> dict[str, dict]:
    """Counts of the rarest and the most frequent label among 2,000 films, by way of drawing."""
    drawn = balanced_sample(labels, patients, names(labels), sizes={"s": DRAWN}, seed=0).sets["s"]
    some = np.sort(np.random.default_rng(0).choice(len(labels), min(STRATIFIED_FROM, len(labels)), replace=False))
    ways = {"balanced": drawn.indices, "random": random_sample(patients, DRAWN, seed=0)}
    ways["iterative stratification"] = some[stratify(labels[some], [DRAWN], seed=0)[0]]
    return {way: measured(labels[rows], drawn.goal) for way, rows in ways.items()}


def measured(labels: np.ndarray, goal: Goal) -> dict:
    counts = labels.sum(0)
    return {
        "films": len(labels),
        "rarest": int(counts.min()),
        "most_frequent": int(counts.max()),
        "labels_below_5_percent": int((counts < 0.05 * len(labels)).sum()),
        "labels_per_film": float(labels.sum(1).mean()),
        "objective": goal.objective(counts),
    }


def show(result: dict) -> None:
    table = Table(title=f"{DRAWN:,} films of {result['speed']['films']:,}", title_justify="left")
    columns = ("films", "rarest", "most_frequent", "labels_below_5_percent", "objective")
    for name in ("drawn", *columns):
        table.add_column(name.replace("_", " "), justify="left" if name == "drawn" else "right")
    for way, found in result["balance"].items():
        table.add_row(way, *(f"{found[name]:,}" for name in columns))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
