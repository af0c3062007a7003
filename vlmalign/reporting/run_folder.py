"""Reads a run folder of any layout, checked, as one `Run`.

Written by this version                       Written by version 0.1, only read
    study.yaml  environment.json  timing.jsonl    config.yaml  environment.json  timing.jsonl
    sets/NAME/coverage.json  skipped.jsonl        data/coverage.json  skipped.jsonl
    stages/NAME/made.json or begun.json           sft/  grpo/  or  01-sft/  02-dpo/ ...
                metrics.jsonl  left_out.jsonl         metrics.jsonl  left_out.jsonl
    answers/ENTRY/STAGE/SET/predictions.jsonl     evaluation/predictions.jsonl
    scores/ENTRY/results.json                     evaluation/results.json
    readers.json
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vlmalign.reporting.json_files import read_object, read_rows, read_yaml
from vlmalign.reporting.json_shape import NUMBER, Maybe, Values, check_shape
from vlmalign.reporting.record import Entry, Row, Run, Stage
from vlmalign.reporting.score_file import LABELS, read_scores

STUDY, CONFIG = "study.yaml", "config.yaml"

PREDICTION = {
    **dict.fromkeys(("stage", "dataset", "id", "reasoning", "completion"), str),
    **{"valid": bool, "reason": Maybe(str), "image": Maybe(str)},
}
MADE = {"kind": str, "parents": dict}
READERS = {"studies": int, "readers": Values(LABELS)}
COVERAGE = {
    "labels": [str],
    "floor": Maybe(NUMBER),
    "sets": Values({"films": int, "patients": int, "counts": Values(int)}),
}
POOL, WHOLE = "pool", "cases"  #: all that a source has; a set without parts
_LINK = re.compile(r"\d\d-(\w+)")  # a stage of `vlmalign align`


def read_run(run: Path) -> Run:
    """The record of the run folder `run`. Raises ValueError for a malformed file, or if it is no run folder."""
    name = next((name for name in (STUDY, CONFIG) if (run / name).is_file()), None)
    if name is None:
        raise ValueError(f"expected a run folder, found neither {STUDY} nor {CONFIG} in {run}; give a run's folder")
    text, config = read_yaml(run / name)
    config = config if isinstance(config, dict) else {}
    command = None
    if name == STUDY:
        stages, entries = _stages(run, config), _entries(run, config)
        sets = _folders(run / "sets", config.get("sets"))
    else:
        chain = isinstance(config.get("stages"), list)
        command = "vlmalign align" if chain else "vlmalign chexreason"
        stages, entries = (_chain(run), []) if chain else _chexreason(run)
        sets = [run / "data"]
    timing: dict[str, float] = {}
    for row in read_rows(run / "timing.jsonl", {"stage": str, "seconds": NUMBER}):
        timing[row["stage"]] = timing.get(row["stage"], 0.0) + row["seconds"]
    return Run(
        path=run,
        command=command,
        config_name=name,
        config=text,
        settings=config,
        stages=stages,
        coverage=_coverage(sets, _section(config, "sets") if name == STUDY else {}),
        left_out=[*_left_out(sets, "skipped.jsonl"), *_left_out((run / s.folder for s in stages), "left_out.jsonl")],
        entries=entries,
        peeked=[name for name, drawn in _section(config, "sets").items() if _section(drawn, "peek")],
        environment=read_object(run / "environment.json", dict) or {},
        readers=read_object(run / "readers.json", READERS),
        timing=timing,
    )


def _stages(run: Path, config: Mapping[str, Any]) -> list[Stage]:
    """Each stage after the one it goes on from, otherwise in the order of the study."""
    # Models and adapters are read where they lie: they have no folder in the run.
    found = {
        name: Stage(name, section["kind"], _state(section.get("from")), "")
        for name, section in _section(config, "stages").items()
        if _section(section, "kind") in ("model", "adapter")
    }
    for folder in _folders(run / "stages", config.get("stages")):
        done = (folder / "made.json").is_file()
        made = read_object(folder / ("made.json" if done else "begun.json"), MADE)
        if made is not None:
            parent = made["parents"].get("from")
            check_shape(parent, Maybe({"node": str}), f"{folder / 'made.json'}, parents, from")
            before = None if parent is None else parent["node"].removeprefix("stages/")
            found[folder.name] = _stage(run, folder, folder.name, made["kind"], before, done=done)
    ordered: dict[str, Stage] = {}

    def add(stage: Stage) -> None:
        if stage.name not in ordered:
            if stage.parent in found and stage.parent != stage.name:
                add(found[stage.parent])
            ordered[stage.name] = stage

    for stage in found.values():
        add(stage)
    return list(ordered.values())


def _state(ref: Any) -> str | None:
    """The stage of a state: `sft` of `sft@last`."""
    return ref.partition("@")[0] if isinstance(ref, str) else None


def _entries(run: Path, config: Mapping[str, Any]) -> list[Entry]:
    found = []
    names = [path.name for room in ("answers", "scores") for path in _folders(run / room, config.get("answers"))]
    for name in dict.fromkeys(names):
        files = sorted((run / "answers" / name).glob("*/*/predictions.jsonl"))
        rows = [row for path in files for row in read_rows(path, PREDICTION)]
        found.append(Entry(name, rows, read_scores(run / "scores" / name / "results.json")))
    return found


def _chain(run: Path) -> list[Stage]:
    """The stages of a run of `vlmalign align`: each goes on from the one before it."""
    stages = [Stage("base", "model", None, "")]
    for folder in _folders(run, None):
        if link := _LINK.fullmatch(folder.name):
            stages.append(_stage(run, folder, folder.name, link[1], stages[-1].name))
    return stages


def _chexreason(run: Path) -> tuple[list[Stage], list[Entry]]:
    scores = read_scores(run / "evaluation" / "results.json")
    rows = read_rows(run / "evaluation" / "predictions.jsonl", PREDICTION)
    scored = set() if scores is None else {stage for results in scores.results.values() for stage in results}
    stages = [Stage("base", "model", None, "")]
    for kind in ("sft", "grpo"):
        if kind in scored or (run / kind).is_dir():
            stages.append(_stage(run, run / kind, kind, kind, stages[-1].name))
    return stages, [Entry("evaluation", rows, scores)] if rows or scores is not None else []


def _stage(run: Path, folder: Path, name: str, kind: str, parent: str | None, *, done: bool = True) -> Stage:
    metrics = read_rows(folder / "metrics.jsonl", {"step": int})
    return Stage(name, kind, parent, folder.relative_to(run).as_posix(), metrics, done)


def _coverage(folders: Iterable[Path], sections: Mapping[str, Any]) -> dict[str, Row]:
    """Source -> the films of its sets together: they have one pool. A set is called NAME, or NAME.PART."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        path = folder / "coverage.json"
        coverage = read_object(path, COVERAGE)
        if coverage is None:
            continue
        for bounds in ("floors", "caps"):  # version 0.1 and runs without any have none
            check_shape(coverage.setdefault(bounds, {}), Values(NUMBER), f"{path}, {bounds}")
        source = str(_section(sections.get(folder.name), "from") or folder.name)
        if source in found and found[source]["labels"] != coverage["labels"]:
            source = folder.name
        joined = found.setdefault(source, {"labels": coverage["labels"], "floors": {}, "caps": {}, "sets": {}})
        floors = {label: coverage["floors"].get(label, coverage["floor"] or 0) for label in coverage["labels"]}
        for label, floor in floors.items():
            joined["floors"][label] = max(joined["floors"].get(label, 0), floor)
            joined["caps"][label] = min(joined["caps"].get(label, 1), coverage["caps"].get(label, 1))
        for part, drawn in coverage["sets"].items():
            if wrong := sorted(set(drawn["counts"]) ^ set(coverage["labels"])):
                raise ValueError(
                    f"{path}, sets, {part}: expected one count per label, found a difference in {wrong}"
                    "; write the file again"
                )
            plain = part == POOL or folder.name not in sections
            name = folder.name if part == WHOLE else part if plain else f"{folder.name}.{part}"
            if drawn["films"]:
                # The floor of one set is none of the others that are drawn from its source.
                joined["sets"][name] = {**drawn, "floors": {} if part == POOL else floors}
    return found


def _left_out(folders: Iterable[Path], file: str) -> list[Row]:
    return [
        {
            "where": row.get("dataset") or folder.name,
            "id": row.get("id") or row.get("name", ""),
            "reason": row["reason"],
        }
        for folder in folders
        for row in read_rows(folder / file, {"reason": str})
    ]


def _folders(room: Path, section: Any) -> list[Path]:
    """The folders of a room, in the order in which a section of the study names them, then by name."""
    order = list(section) if isinstance(section, dict) else []
    found = [path for path in room.iterdir() if path.is_dir()] if room.is_dir() else []
    return sorted(found, key=lambda path: (order.index(path.name) if path.name in order else len(order), path.name))


def _section(config: Any, name: str) -> Any:
    return (config.get(name) if isinstance(config, dict) else None) or {}
