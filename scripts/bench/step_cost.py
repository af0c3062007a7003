"""What a GRPO step costs as completions per prompt, prompts, and their lengths grow: ours alone, a table and JSON.

    python scripts/bench/step_cost.py
    python scripts/bench/step_cost.py --kind text --out scripts/bench/results/step_cost.json

From one step (8 completions of 64 tokens for one prompt of 300, an image among them) each of the four is changed by
itself. Steps of all settings are made in turn, so that they share what else the machine does; a row gives the median
and what it is of the first row's, beside what it would be if every completion were computed with a prompt of its own.
A step is what it is in `training.py`.
"""

# ruff: noqa: E402 - the environment must be set before torch and JAX are imported

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from vlmalign.host_memory import keep_freed_memory

keep_freed_memory()  # as the vlmalign command does

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import transformers
from matmul import matmul_rates, versions
from ours import Bench
from rich.console import Console
from rich.table import Table
from shapes import KINDS, Sizes, prompt_tokens, write_checkpoint


class Setting(NamedTuple):
    group: int = 8
    prompt: int = 300  #: tokens
    completion: int = 64  #: tokens
    prompts: int = 1  #: per step

    @property
    def alone(self) -> int:
        """Tokens of a pass in which no completion shares its prompt."""
        return self.prompts * self.group * (self.prompt + self.completion)

    @property
    def shared(self) -> int:
        """Tokens of a pass over groups."""
        return self.prompts * (self.prompt + self.group * self.completion)


SETTINGS = (
    Setting(),
    *(Setting(group=number) for number in (2, 4, 16)),
    *(Setting(prompt=number) for number in (450, 600, 900)),
    *(Setting(completion=number) for number in (32, 128, 256)),
    *(Setting(prompts=number) for number in (2, 4)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="image", choices=KINDS)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of every setting")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    result = {
        "versions": versions(),
        "kind": asked.kind,
        "load_before": os.getloadavg(),
        "matmul": matmul_rates()["jax"],
    }
    with tempfile.TemporaryDirectory() as scratch:
        folder, sizes = Path(scratch) / asked.kind, Sizes()
        processor = write_checkpoint(folder, asked.kind, sizes, seed=0)
        spare = prompt_tokens(processor, asked.kind, "w1 w2 w3", sizes) - 3
        steps = {}
        for setting in SETTINGS:
            lengths = replace(sizes, prompt=setting.prompt, completion=setting.completion)
            steps[setting] = Bench(folder, asked.kind, lengths, spare=spare).grpo(setting.group, setting.prompts)
            steps[setting]()  # compiles
            print(f"ready: {setting}", file=sys.stderr, flush=True)
        taken: dict[Setting, list[float]] = {setting: [] for setting in SETTINGS}
        for _ in range(asked.steps):
            for setting, step in steps.items():
                began = time.perf_counter()
                step()
                taken[setting].append(time.perf_counter() - began)
    medians = {setting: statistics.median(seconds) for setting, seconds in taken.items()}
    first = SETTINGS[0]
    result["rows"] = [
        {
            **setting._asdict(), "seconds": medians[setting], "all": taken[setting],
            "of_first": medians[setting] / medians[first],
            "tokens_of_first": setting.shared / first.shared,
            "alone_of_first_shared": setting.alone / first.shared,
        }
        for setting in SETTINGS
    ]  # fmt: skip
    result["load_after"] = os.getloadavg()
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))
    Console(stderr=True).print(table(result["rows"]))


def table(rows: list[dict]) -> Table:
    found = Table(title="a GRPO step, medians", title_justify="left")
    for name in ("G", "prompt", "completion", "prompts", "seconds", "of the first", "its tokens", "without sharing"):
        found.add_column(name, justify="right")
    for row in rows:
        found.add_row(
            *(str(row[name]) for name in Setting._fields), f"{row['seconds']:.2f}", f"{row['of_first']:.2f}",
            f"{row['tokens_of_first']:.2f}", f"{row['alone_of_first_shared']:.2f}",
        )  # fmt: skip
    return found


if __name__ == "__main__":
    main()
