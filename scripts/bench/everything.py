"""Every benchmark of this folder that needs no GPU, one after the other, and one table of what they found.

    python scripts/bench/everything.py                            # about half an hour on 2 cores
    python scripts/bench/everything.py --only rollout training    # some of them
    python scripts/bench/everything.py --tunix tunix/bin/python   # google-tunix too, see grpo_tunix.py

Each runs in a process of its own and writes its JSON into `--into` (by default `scripts/bench/results`), the raw times
and versions among it; what they measure stands at the head of each script. Prints the table, and as JSON the same rows.
On a shared machine only ratios mean anything.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent


class Row(NamedTuple):
    what: str
    ours: float
    peer: float | None  #: in the same unit; None: nothing to compare with
    unit: str
    corrected: float | None = None  #: the ratio without the gap between the frameworks' matrix products

    @property
    def ratio(self) -> float | None:
        """How many times less than the peer's."""
        return None if self.peer is None else self.peer / self.ours


def rollout_rows(found: dict[str, Any]) -> Iterator[Row]:
    ours, peer = (found["median_seconds"][name] for name in ("vlmalign", "transformers"))
    yield Row("8 x 64 tokens beside generate", ours, peer, "s", found["corrected"])


def training_rows(found: dict[str, Any]) -> Iterator[Row]:
    for job in found["jobs"]:
        group = f", G = {job['group']}" if job["group"] else ""
        name = f"{job['job'].upper()} {job['kind']}{group}, beside TRL"
        yield Row(name, job["vlmalign_s"], job["trl_s"], "s", job["ratio_corrected"])


def tunix_rows(found: dict[str, Any]) -> Iterator[Row]:
    yield Row("GRPO of the whole model, beside google-tunix", found["vlmalign_s"], found["tunix_s"], "s")


def step_cost_rows(found: dict[str, Any]) -> Iterator[Row]:
    for row in found["rows"]:
        names = ("group", "prompt", "completion", "prompts")
        yield Row("GRPO " + " ".join(f"{name} {row[name]}" for name in names), row["seconds"], None, "s")


def sampler_rows(found: dict[str, Any]) -> Iterator[Row]:
    yield Row("2,000 films of 377,110 drawn", found["speed"]["wall_s"], None, "s")


def input_rows(found: dict[str, Any]) -> Iterator[Row]:
    for name, rate in found["films_per_second"].items():
        yield Row(f"film: {name}", 1000 / rate, None, "ms")
    for name, share in found["device_waits"].items():
        yield Row(f"device waits: {name}", 100 * share, None, "%")


#: benchmark -> (its script, its rows); the file it writes bears its name
BENCHMARKS: dict[str, tuple[str, Callable[[dict[str, Any]], Iterator[Row]]]] = {
    "rollout": ("rollout.py", rollout_rows),
    "training": ("training.py", training_rows),
    "tunix": ("grpo_tunix.py", tunix_rows),
    "step_cost": ("step_cost.py", step_cost_rows),
    "sampler": ("sampler.py", sampler_rows),
    "input": ("input.py", input_rows),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    parser.add_argument("--tunix", help="a Python interpreter that has google-tunix; without it, that one is left out")
    parser.add_argument("--into", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    rows: list[Row] = []
    for name in asked.only:
        script, read = BENCHMARKS[name]
        if name == "tunix" and asked.tunix is None:
            print("left out: google-tunix (give --tunix)", file=sys.stderr)
            continue
        file = asked.into / f"{name}.json"
        command = [sys.executable, str(HERE / script), "--out", str(file)]
        command += ["--tunix", asked.tunix] if name == "tunix" else []
        print(f"running: {name}", file=sys.stderr, flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows += read(json.loads(file.read_text(encoding="utf-8")))
    print(json.dumps([row._asdict() | {"ratio": row.ratio} for row in rows], indent=1))
    table = Table(title="medians", title_justify="left")
    for head in ("", "vlmalign", "peer", "", "ratio", "without matmul rates"):
        table.add_column(head, justify="right" if head else "left")
    for row in rows:
        numbers = (row.peer, row.ratio, row.corrected)
        peer, ratio, corrected = ("" if number is None else f"{number:.3g}" for number in numbers)
        table.add_row(row.what, f"{row.ours:.3g}", peer, row.unit, ratio, corrected)
    Console(stderr=True).print(table)


if __name__ == "__main__":
    main()
