"""What a finished run says of itself on the terminal: each stage's first and last numbers, scores, and where results are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vlmalign.evaluation.metrics import headline
from vlmalign.reporting.json_shape import NUMBER
from vlmalign.reporting.visible_text import plain
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.files import read_numbers, read_rows
from vlmalign.studies.engine.graph import Node
from vlmalign.studies.engine.score import read_results
from vlmalign.studies.engine.stage_config import Policy

#: a line of `timing.jsonl`
TIMING = {"stage": str, "seconds": NUMBER}
#: kind of stage -> metrics worth a line, those that were measured
TOLD = {
    "sft": ("loss", "validation/loss", "validation/macro_f1"),
    "dpo": ("objective", "rewards/accuracies", "rewards/margins", "validation/loss", "validation/accuracy"),
    "grpo": ("reward", "length", "stopped", "kl", "entropy", "unscored", "validation/reward", "validation/macro_f1"),
    "ppo": ("reward", "length", "stopped", "kl", "entropy", "unscored", "value_error", "validation/reward"),
}


def print_summary(config: StudyConfig, nodes: Mapping[str, Node]) -> None:
    """Tables on the terminal, or as plain lines where there is none."""
    console = Console()
    if not console.is_terminal:
        # A log file has no width of its own, and 80 columns would fold rows.
        console = Console(width=150)
    made = [name for name in config.trained if (config.run / "stages" / name / "metrics.jsonl").exists()]
    if made:
        console.print(stages_table(config, made), highlight=False)
        for line in flat_lines(config, made):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    for node in nodes.values():
        path = node.folder(config.run) / "results.json"
        if node.kind == "scores" and path.exists():
            console.print(scores_table(node.key, read_results(path)), highlight=False)
    console.print(timing_table(config.run / "timing.jsonl"), highlight=False)
    for name in made:
        for result in ("adapter", "model"):
            if (folder := config.run / "stages" / name / result).is_dir():
                console.print(f"{result}: {folder}", soft_wrap=True, highlight=False, markup=False)
    if (report := config.run / "report.html").exists():
        console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)


def stages_table(config: StudyConfig, names: list[str]) -> Table:
    """First and last fifth of the updates of each stage, means over what was measured; validation: first and last."""
    table = Table(title="means over the first and the last fifth of what was measured", title_justify="left")
    for column in ("stage", "updates", "number", "first", "last"):
        table.add_column(column, justify="left" if column in ("stage", "number") else "right")
    for name in names:
        stage = config.stages[name]
        path = config.run / "stages" / name / "metrics.jsonl"
        rewards = tuple(stage.reward_names) if isinstance(stage, Policy) else ()
        for number in (*TOLD[stage.kind], *rewards):
            values = read_numbers(path, number)
            first, last = ends(values)
            if first is not None:
                table.add_row(name, str(len(values)), number, f"{first:.4g}", f"{last:.4g}")
        table.add_section()
    return table


def flat_lines(config: StudyConfig, names: list[str]) -> list[str]:
    """A sentence for each stage in most of whose updates no group had anything to compare."""
    found = []
    for name in names:
        lines = read_rows(config.run / "stages" / name / "metrics.jsonl")
        flat = sum(line.get("flat_groups") == 1.0 for line in lines)
        if flat > len(lines) / 2:
            found.append(
                f"stage {name}: {flat} of {len(lines)} updates had nothing to compare, since the completions of every "
                "prompt got the same reward; look at its completions, and at the reward"
            )
    return found


def cell(text: str) -> Text:
    """A text of a run's files for a table on the terminal: no markup of rich's in it, and nothing that steers."""
    return Text(plain(text))


def ends(measured: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Means over the first and the last fifth of what was measured; None where nothing was.

    >>> ends([2.0, None, None, 1.0])
    (2.0, 1.0)
    """
    values = [value for value in measured if value is not None]
    if not values:
        return None, None
    size = max(1, len(values) // 5)
    return sum(values[:size]) / size, sum(values[-size:]) / size


def scores_table(name: str, results: Mapping[str, Any]) -> Table:
    """The headline number of every stage on every set, beside the best trivial baseline."""
    table = Table(title=f"{name}: scores with 95 % intervals", title_justify="left")
    for column in ("set", "n", "system", "number", "value", "not valid"):
        table.add_column(column, justify="right" if column in ("n", "not valid") else "left")
    for dataset in results["datasets"]:
        of = dataset["name"]
        rows = [(row["stage"], row["results"]) for row in results["results"] if row["dataset"] == of]
        baselines = [(row["name"], row["results"]) for row in results["baselines"] if row["dataset"] == of]
        if baselines:
            rows.append(max(baselines, key=lambda row: headline(row[1])[1] or 0.0))
        for who, found in rows:
            number, value, low, high = headline(found)
            table.add_row(
                cell(f"{of} ({dataset['role']})"), str(found["n"]), cell(who), number, _interval(value, low, high),
                f"{found.get('fail_rate', 0.0):.3f}",
            )  # fmt: skip
        table.add_section()
    return table


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.3f}" if low is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def timing_table(path: Path) -> Table:
    """Seconds of every artefact, over all starts."""
    seconds: dict[str, float] = {}
    for row in read_rows(path, TIMING) if path.exists() else ():
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    table = Table(title="seconds", title_justify="left")
    table.add_column("artefact")
    table.add_column("seconds", justify="right")
    for name, value in seconds.items():
        table.add_row(cell(name), f"{value:.1f}")
    table.add_row("all", f"{sum(seconds.values()):.1f}")
    return table
