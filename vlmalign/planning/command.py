"""`vlmalign plan`: what a config needs and costs on devices that need not be here."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

#: of the roofline, for the GPU-hours to expect: what good training and decoding programs reach
SHARE = 0.5


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a run of align or chexreason")
    parser.add_argument(
        "--device",
        required=True,
        metavar="NAME",
        help="a100-40, a100-80, h100, h200, rtx4090-24, or this: the one that JAX runs on here, measured",
    )
    parser.add_argument("--count", type=int, default=1, metavar="N", help="devices of this kind (default 1)")
    parser.add_argument("--model-config", type=Path, metavar="FILE", help="config.json, where model.path has none")
    parser.add_argument(
        "--set", dest="overrides", metavar="a.b=c", nargs="+", action="extend", default=[], help="change settings"
    )
    parser.add_argument("--prompt-tokens", type=int, metavar="N", help="by default counted, or guessed, and said")
    parser.add_argument("--answer-tokens", type=int, metavar="N", help="of an SFT answer; default: the rollouts' limit")
    parser.add_argument(
        "--completion-tokens", type=int, metavar="N", help="mean of sampled completions, for times; default: the limit"
    )
    parser.add_argument(
        "--share", type=float, default=SHARE, metavar="X", help=f"of the roofline, for GPU-hours (default {SHARE})"
    )
    parser.add_argument("--no-search", dest="search", action="store_false", help="look for no better settings")
    parser.add_argument("--quick", action="store_true", help="draw training out from models of 2 and 4 layers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")


def run(arguments: argparse.Namespace) -> None:
    """Plan and print; ValueError for what cannot be planned."""
    from vlmalign.planning.devices import THIS, find_device

    if not 0 < arguments.share <= 1:
        raise ValueError(f"--share must be above 0 and at most 1, found {arguments.share:g}")
    # All that can be wrong with the arguments is found before JAX is loaded.
    device = None if arguments.device == THIS else find_device(arguments.device)
    if arguments.count < 1:
        raise ValueError(f"--count must be >= 1, found {arguments.count}")
    started, spent = time.perf_counter(), time.process_time()
    import jax

    if device is not None:
        # The devices here are not asked for: a GPU that is busy, or a plug-in without one, is no obstacle.
        jax.config.update("jax_platforms", "cpu")
    from rich.console import Console

    from vlmalign.planning.plan import make_plan
    from vlmalign.planning.record import record
    from vlmalign.planning.report import show
    from vlmalign.planning.study import read_study
    from vlmalign.planning.this_device import this_device

    found = this_device if device is None else lambda dtype: device
    workload, target = read_study(
        arguments.config,
        arguments.overrides,
        found,
        arguments.count,
        model_config=arguments.model_config,
        prompt=arguments.prompt_tokens,
        answer=arguments.answer_tokens,
        completion=arguments.completion_tokens,
    )
    progress = Console(stderr=True)
    plan = make_plan(
        workload,
        target,
        search=arguments.search,
        quick=arguments.quick,
        say=lambda text: progress.print(f"[dim]{text}[/dim]"),
    )
    found = record(plan, share=arguments.share)
    found["planned_in"] = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - spent, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    # Tables do not fit the 80 columns that a pipe is taken to have.
    show(found, Console(width=None if sys.stdout.isatty() else 120))
