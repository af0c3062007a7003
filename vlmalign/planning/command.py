"""`vlmalign plan`: what a config needs and costs on devices that need not be here."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

#: of the roofline, for the GPU-hours to expect: what good training and decoding programs reach
SHARE = 0.5


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", metavar="CONFIG", type=Path, help="YAML file of a ChexReason run")
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
    import jax

    if device is not None:
        # The devices here are not asked for: a GPU that is busy, or a plug-in without one, is no obstacle.
        jax.config.update("jax_platforms", "cpu")
    from rich.console import Console

    from vlmalign.config import load_config
    from vlmalign.planning.inputs import read_lengths, read_model
    from vlmalign.planning.plan import make_plan
    from vlmalign.planning.record import record
    from vlmalign.planning.report import show
    from vlmalign.planning.target import open_target
    from vlmalign.planning.this_device import this_device
    from vlmalign.planning.workload import read_workload
    from vlmalign.studies.chexreason.config import ChexReasonConfig

    config = load_config(ChexReasonConfig, arguments.config, arguments.overrides)
    model = read_model(config, arguments.model_config)
    lengths = read_lengths(
        config,
        model,
        prompt=arguments.prompt_tokens,
        answer=arguments.answer_tokens,
        completion=arguments.completion_tokens,
    )
    workload = read_workload(config, model, lengths, count=arguments.count)
    target = open_target(this_device(model.dtype) if device is None else device, arguments.count)
    progress = Console(stderr=True)
    plan = make_plan(workload, target, search=arguments.search, say=lambda text: progress.print(f"[dim]{text}[/dim]"))
    found = record(plan, share=arguments.share)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    # Tables do not fit the 80 columns that a pipe is taken to have.
    show(found, Console(width=None if sys.stdout.isatty() else 120))
