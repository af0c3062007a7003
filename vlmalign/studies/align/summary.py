"""What a finished run says of itself on the terminal: each stage's first and last numbers, and where the result is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlmalign.studies.align.config import AlignConfig

#: kind of stage -> metrics worth a line, those that were measured
TOLD = {
    "sft": ("loss", "validation/loss"),
    "dpo": ("objective", "rewards/accuracies", "rewards/margins", "validation/loss", "validation/accuracy"),
    "grpo": ("reward", "length", "stopped", "kl", "entropy", "unscored", "validation/reward"),
    "ppo": ("reward", "length", "stopped", "kl", "entropy", "unscored", "value_error", "validation/reward"),
}


def print_summary(config: AlignConfig, result: Path) -> None:
    """Tables on the terminal, or as plain lines where there is none."""
    console = Console()
    if not console.is_terminal:
        # A log file has no width of its own, and 80 columns would fold rows.
        console = Console(width=150)
    console.print(stages_table(config), highlight=False)
    console.print(f"{result.name}: {result}", soft_wrap=True, highlight=False, markup=False)


def stages_table(config: AlignConfig) -> Table:
    """First and last fifth of the updates of each stage, means over what was measured; validation: first and last."""
    table = Table(title="means over the first and the last fifth of what was measured", title_justify="left")
    for column in ("stage", "updates", "number", "first", "last"):
        table.add_column(column, justify="left" if column in ("stage", "number") else "right")
    for index, stage in enumerate(config.stages):
        folder = config.folder(index)
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        rewards = tuple(stage.rewards) if stage.kind in ("grpo", "ppo") else ()
        for name in (*TOLD[stage.kind], *rewards):
            first, last = ends(lines, name)
            if first is not None:
                table.add_row(folder.name, str(len(lines)), name, f"{first:.4g}", f"{last:.4g}")
        table.add_section()
    return table


def ends(lines: list[Mapping[str, Any]], name: str) -> tuple[float | None, float | None]:
    """Means over the first and the last fifth of the lines that have this number; None where none has.

    >>> ends([{"loss": 2.0}, {}, {"loss": None}, {"loss": 1.0}], "loss")
    (2.0, 1.0)
    """
    values = [line[name] for line in lines if line.get(name) is not None]
    if not values:
        return None, None
    size = max(1, len(values) // 5)
    return sum(values[:size]) / size, sum(values[-size:]) / size
