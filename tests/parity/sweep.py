"""Random configurations of every family against transformers: bash scripts/test.sh parity --count N [options].

Prints one line per configuration and a table at the end; fails when any configuration did. A configuration is a pure
function of its family and seed, so a failing one is run again by these two alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import torch
from comparison import GREEDY, TIE, TOLERANCE, Outcome, check, plan
from configurations import CONFIGURATIONS
from transformers.utils import logging

#: what the numbers depend on
PACKAGES = ("jax", "flax", "numpy", "torch", "transformers")

COLUMNS = (
    "family",
    "configurations",
    "failed",
    "logits",
    "gradients",
    "relative",
    "rounded",
    "compared",
    "equal",
    "ties",
)


def rerun(family: str, seed: int) -> str:
    return f"bash scripts/test.sh parity --count 1 --family {family} --seed {seed}"


def run(families: Sequence[str], seeds: range) -> Iterator[Outcome]:
    """Every configuration in turn, each in a folder of its own; what it raises is one of its problems."""
    for seed in seeds:
        for family in families:
            with tempfile.TemporaryDirectory(prefix="vlmalign-parity-") as folder:
                try:
                    outcome = check(family, seed, Path(folder) / "checkpoint")
                except Exception:
                    # One configuration that cannot be run must not hide what the others show.
                    outcome = Outcome(family, seed, problems=[traceback.format_exc()])
            # Every configuration compiles programs of its own; kept, they would fill the memory.
            jax.clear_caches()
            yield outcome


def line(outcome: Outcome) -> str:
    head = f"{outcome.family:12} seed {outcome.seed:4}  "
    if outcome.problems:
        drawn = plan(outcome.family, outcome.seed)
        return "\n  ".join([f"{head}FAILED", *outcome.problems, f"{drawn}", rerun(outcome.family, outcome.seed)])
    return (
        f"{head}logits {outcome.logits:.1e}  gradients {outcome.gradient:.1e} ({outcome.relative:.1e})"
        f"{' of the reference in float64' if outcome.rounded else ''}  "
        f"greedy {outcome.equal}/{outcome.compared}, {outcome.ties} ties, {outcome.distinct} different  "
        f"{outcome.seconds:.1f} s"
    )


def worst(outcomes: Sequence[Outcome], name: str) -> dict[str, Any]:
    """The largest value of a difference and the seed that shows it."""
    found = max(outcomes, key=lambda outcome: getattr(outcome, name))
    return {"value": float(f"{getattr(found, name):.2g}"), "seed": found.seed}


def summarise(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """One row per family; differences are the worst of the configurations that ran to the end."""
    rows = []
    for family in dict.fromkeys(outcome.family for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.family == family]
        ran = [outcome for outcome in mine if outcome.compared]
        row = {"family": family, "configurations": len(mine), "failed": sum(bool(o.problems) for o in mine)}
        for column, name in (("logits", "logits"), ("gradients", "gradient"), ("relative", "relative")):
            row[column] = worst(ran, name) if ran else None
        row |= {name: sum(getattr(o, name) for o in ran) for name in ("rounded", "compared", "equal", "ties")}
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['value']:.1e} (seed {value['seed']})"
        return "not run" if value is None else str(value)

    head = ("family", "configurations", "failed", "worst logit difference", "worst gradient difference",
            "relative to the tensor's largest entry", "reference rounded", "greedy tokens compared", "equal", "answers parting at a tie")  # fmt: skip
    lines = [head, ["---"] * len(head), *([cell(row[column]) for column in COLUMNS] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def results(rows: Sequence[dict[str, Any]], seeds: range, seconds: float) -> tuple[dict[str, Any], str]:
    """The record of a run, and the page that shows it."""
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    command = f"bash scripts/test.sh parity --count {len(seeds)} --seed {seeds.start}"
    record = {
        "command": command, "versions": versions, "tolerance": TOLERANCE, "tie": TIE, "greedy_tokens": GREEDY,
        "seconds": round(seconds), "families": rows,
    }  # fmt: skip
    page = f"""# Parity with transformers on random configurations

`{command} --write tests/parity` wrote this page; what is drawn is in `configurations.py` and `prompts.py`.

{table(rows)}

A difference is max|a - b| / max(1, max|b|), over the logits of all real tokens, or over the loss and the gradients of
all parameters; at most {TOLERANCE:g} is allowed. The second gradient column divides by the largest entry of the tensor
itself, over tensors where that is above 1e-3. "Reference rounded" counts configurations whose gradients differ by more
from the reference in float32, but not from the reference in float64, with which they are then compared: there the
reference's own rounding is larger than what is allowed. Greedy answers of {GREEDY} tokens are compared token for token up to
where they part, which they may do only where the reference's two best logits lie within {TIE:g} (a tie).

{", ".join(f"{name} {number}" for name, number in versions.items())}; CPU, float32; {seconds / 60:.0f} minutes.
"""
    return record, page


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bash scripts/test.sh parity", description=__doc__)
    parser.add_argument("--count", type=int, default=1, help="configurations per family")
    parser.add_argument("--seed", type=int, default=0, help="of the first configuration; the others count up from it")
    parser.add_argument("--family", action="append", choices=list(CONFIGURATIONS), help="default: all")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write RESULTS.md and RESULTS.json there")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error(f"--count must be at least 1, found {options.count}")
    torch.set_num_threads(1)  # of tensors this small, the cost of handing out work is most
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    started = time.perf_counter()
    families, seeds = options.family or list(CONFIGURATIONS), range(options.seed, options.seed + options.count)
    outcomes = []
    for outcome in run(families, seeds):
        print(line(outcome), flush=True)
        outcomes.append(outcome)
    seconds = time.perf_counter() - started
    rows = summarise(outcomes)
    record, page = results(rows, seeds, seconds)
    print(f"\n{table(rows)}\n")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(outcomes)} configurations in {seconds:.0f} s, at most {memory:.1f} GiB")
    if options.write is not None:
        options.write.mkdir(parents=True, exist_ok=True)
        (options.write / "RESULTS.md").write_text(page, encoding="utf-8")
        (options.write / "RESULTS.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    failed = [outcome for outcome in outcomes if outcome.problems]
    for outcome in failed:
        print(f"failed: {rerun(outcome.family, outcome.seed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
