"""`vlmalign status`: the graph of a run as it stands: what is there, under way, waiting or stale, and its headline number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from vlmalign.config import load_config
from vlmalign.evaluation.metrics import headline
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.files import read_numbers, read_rows
from vlmalign.studies.engine.folder import STUDY
from vlmalign.studies.engine.graph import REPORT, Edge, Node, build_graph
from vlmalign.studies.engine.identity import is_given
from vlmalign.studies.engine.owner import Owners
from vlmalign.studies.engine.record import read_record
from vlmalign.studies.engine.score import read_results
from vlmalign.studies.engine.stage_config import Policy, Stage
from vlmalign.studies.engine.summary import TIMING, cell


class Line(NamedTuple):
    """One artefact."""

    name: str
    kind: str
    state: str  #: "done", "under way", "waiting", "stale" or "given"
    progress: str  #: steps of steps
    seconds: float | None
    headline: str
    owner: str | None = None  #: who is at work on it


def status(run: Path) -> list[Line]:
    """The artefacts of a run, in order.

    Raises:
        ValueError: when `run` holds no study.
    """
    path = run / STUDY
    if not path.is_file():
        raise ValueError(f"{run} holds no study ({STUDY}); give the folder of a run")
    # JSON quotes the folder's name: `007` is not a number here.
    config = load_config(StudyConfig, path, [f"run={json.dumps(str(run))}"])
    seconds: dict[str, float] = {}
    for row in read_rows(run / "timing.jsonl", TIMING) if (run / "timing.jsonl").exists() else ():
        seconds[row["stage"]] = seconds.get(row["stage"], 0.0) + row["seconds"]
    ids: dict[Edge, str] = {}
    lines = []
    owners = Owners(run)
    for node in build_graph(config).values():
        state = _state(config, node, ids)
        told = (_progress(config, node), seconds.get(node.name), _headline(config, node))
        owner = owners.holder(node.name)
        lines.append(Line(node.name, node.kind, state, *told, None if owner is None else str(owner)))
    return lines


def _state(config: StudyConfig, node: Node, ids: dict[Edge, str]) -> str:
    """What the records say; `ids` gathers the contents of what is there."""
    if is_given(node):
        return "given"
    if node.kind == REPORT:
        return "done" if (config.run / "report.html").exists() else "waiting"
    record, whole = read_record(node.folder(config.run))
    if record is None:
        return "waiting"
    if whole:
        ids[Edge(node.name)] = record["id"]
        ids.update({Edge(node.name, which): found for which, found in record["content"].items()})
    for role, edge in node.parents.items():
        known = record["parents"].get(role)
        if known is None or (edge in ids and known["id"] != ids[edge]):
            return "stale"
    return "done" if whole else "under way"


def _progress(config: StudyConfig, node: Node) -> str:
    stage = config.stages.get(node.key) if node.name.startswith("stages/") else None
    path = node.folder(config.run) / "metrics.jsonl"
    if not isinstance(stage, Stage) or not path.exists():
        return ""
    done = len(read_rows(path))
    steps = getattr(stage, "steps", None)
    return f"{done} of {steps}" if steps is not None else str(done)


def _headline(config: StudyConfig, node: Node) -> str:
    if node.kind == "scores" and (path := node.folder(config.run) / "results.json").exists():
        return "; ".join(_told(row) for row in read_results(path)["results"])
    stage = config.stages.get(node.key) if node.name.startswith("stages/") else None
    path = node.folder(config.run) / "metrics.jsonl"
    if not isinstance(stage, Stage) or not path.exists():
        return ""
    name = "reward" if isinstance(stage, Policy) else "objective"
    values = [value for value in read_numbers(path, name) if value is not None]
    return f"{name} {values[0]:.4g} -> {values[-1]:.4g}" if values else ""


def _told(row: Mapping[str, Any]) -> str:
    name, value, _, _ = headline(row["results"])
    return f"{row['stage']} on {row['dataset']}: {name} {'undefined' if value is None else f'{value:.3f}'}"


def print_status(run: Path) -> None:
    """`status` as a table."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    table = Table()
    for column in ("artefact", "kind", "state", "steps", "seconds", "headline"):
        table.add_column(column, justify="right" if column in ("steps", "seconds") else "left")
    for line in status(run):
        state = line.state if line.owner is None else f"{line.state}, by {line.owner}"
        seconds = "" if line.seconds is None else f"{line.seconds:.1f}"
        table.add_row(*map(cell, (line.name, line.kind, state, line.progress, seconds, line.headline)))
    console.print(table, highlight=False)
