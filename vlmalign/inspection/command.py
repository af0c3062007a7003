"""`vlmalign inspect PATH`: print the report; the exit code says whether anything is wrong."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", type=Path, help="folder of a checkpoint, or of a PEFT adapter")


def run(arguments: argparse.Namespace) -> None:
    """Raises ValueError, after the report, when something is wrong with the folder."""
    # Shapes are traced by JAX, which would otherwise reserve an accelerator's memory for it.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from vlmalign.inspection.inspect import inspect
    from vlmalign.inspection.report import describe
    from vlmalign.reporting.visible_text import plain

    found = inspect(arguments.path)
    print(plain(describe(found)), flush=True)
    if found.problems:
        count = len(found.problems)
        raise ValueError(f"{arguments.path} has {count} problem{'s' * (count > 1)}, listed above")
