"""`vlmalign plan`: what a study needs and costs on devices that need not be here."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from vlmalign.planning.devices import SHARE, THIS, find_device


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""

    def several(name: str, metavar: str, help: str, **more: str) -> None:
        parser.add_argument(name, metavar=metavar, nargs="+", action="extend", default=[], help=help, **more)

    parser.add_argument("config", metavar="STUDY.yaml", type=Path, help="YAML file of a study")
    parser.add_argument(
        "--device",
        required=True,
        metavar="NAME",
        help="a100-40, a100-80, h100, h200, rtx4090-24, or this: the one that JAX runs on here, measured",
    )
    parser.add_argument("--count", type=int, default=1, metavar="N", help="devices of this kind (default 1)")
    several("--stage", "NAME", "plan only these stages (default: all that train, and all answers)", dest="stages")
    several(
        "--model-config",
        "[STAGE=]X",
        "a config.json, or a public model by name (medgemma-4b), in place of the checkpoint folder's",
    )
    several("--set", "a.b=c", "change settings", dest="overrides")
    for name, what in (
        ("prompt", "of a prompt, images included; by default counted, or guessed, and said"),
        ("answer", "of an answer that is learnt from; by default counted, or a limit"),
        ("completion", "mean of sampled completions, for times; default: the limit"),
        ("image", "of all images of a prompt, where neither model nor data says it"),
    ):
        parser.add_argument(f"--{name}-tokens", type=int, metavar="N", help=what)
    parser.add_argument(
        "--share", type=float, default=SHARE, metavar="X", help=f"of the roofline, for GPU-hours (default {SHARE})"
    )
    parser.add_argument("--no-search", dest="search", action="store_false", help="look for no better settings")
    parser.add_argument("--quick", action="store_true", help="draw training out from models of 2 and 4 layers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there as well")


def run(arguments: argparse.Namespace) -> None:
    """Plan and print; ValueError for what cannot be planned."""
    if not 0 < arguments.share <= 1:
        raise ValueError(f"--share must be above 0 and at most 1, found {arguments.share:g}")
    # All that can be wrong with the arguments is found before JAX is loaded.
    device = None if arguments.device == THIS else find_device(arguments.device)
    for name, value in vars(arguments).items():
        if (name == "count" or name.endswith("_tokens")) and value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be >= 1, found {value}")
    started, spent = time.perf_counter(), time.process_time()
    import jax

    if device is not None:
        # The devices here are not asked for: a GPU that is busy, or a plug-in without one, is no obstacle.
        jax.config.update("jax_platforms", "cpu")
    from rich.console import Console

    from vlmalign.planning.lengths import Given
    from vlmalign.planning.plan import make_plan
    from vlmalign.planning.record import record
    from vlmalign.planning.report import show
    from vlmalign.planning.study import workloads_of
    from vlmalign.planning.this_device import this_device
    from vlmalign.studies.engine.chain import load_study

    read = workloads_of(
        load_study(arguments.config, arguments.overrides),
        this_device if device is None else lambda dtype: device,
        arguments.count,
        model_configs=dict(text.rpartition("=")[::2] for text in arguments.model_config),
        given=Given(*(getattr(arguments, f"{name}_tokens") for name in Given._fields)),
        only=arguments.stages,
    )
    # Tables do not fit the 80 columns that a pipe is taken to have.
    progress, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 120)

    def say(text: str) -> None:
        progress.print(f"[dim]{text}[/dim]")

    found = []
    for workload, target in read:
        plan = make_plan(workload, target, search=arguments.search, quick=arguments.quick, say=say)
        found.append(record(plan, share=arguments.share))
        show(found[-1], console)
    spent_on = {
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - spent, 1),
        "cores": len(os.sched_getaffinity(0)),
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"plans": found, "planned_in": spent_on}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")
