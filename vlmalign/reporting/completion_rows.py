"""Reads `completions.jsonl` of a stage: what was sampled and rewarded, as one record a step, one step at a time.

A line holds one completion, in the order of training: step, then prompt, then sample. A log can be larger than memory
should be asked for, so no more than a step is held. A last line that breaks off (the run was killed, or is writing it
now) belongs to no step and is told apart; any other damage is an error that names file and line, and never quotes
the text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.reporting.json_files import parse_json
from vlmalign.reporting.json_shape import NUMBER, Maybe, Values, check_shape

ROW = {
    "step": int,
    "prompt_id": (int, str),
    "sample": int,
    "images": [str],
    "prompt": str,
    "completion": str,
    "tokens": int,
    "stopped": bool,
    "reward": Maybe(NUMBER),
    "parts": Values(Maybe(NUMBER)),
    "advantage": Maybe(NUMBER),
}

#: Sums of equal rewards may differ by rounding; up to so many times the largest reward is no difference.
#: The rule of the advantages (objectives/advantages.py), so that a group is flat here when it was flat there.
ROUNDING = 8 * 2.0**-52


class Completion(NamedTuple):
    """One sampled answer and what it was given."""

    sample: int  #: its place in the group, from 0
    text: str
    tokens: int
    stopped: bool  #: False: cut off at the length limit
    reward: float | None  #: None: could not be scored
    parts: dict[str, float | None]  #: reward by component, before weights
    advantage: float | None
    nonfinite: dict[str, str]  #: "advantage" or another entry -> "nan", "inf", "-inf": null above for this reason


@dataclass(frozen=True)
class PromptGroup:
    """A prompt and the completions that were compared with each other."""

    prompt_id: str
    images: tuple[str, ...]
    prompt: str
    columns: dict[str, Any]  #: what rewards were given by name, such as the truth
    completions: list[Completion]

    @cached_property
    def rewards(self) -> list[float]:
        """Those that are known."""
        return [one.reward for one in self.completions if one.reward is not None]

    @property
    def unscored(self) -> int:
        return len(self.completions) - len(self.rewards)

    @property
    def flat(self) -> bool:
        """True when no two known rewards differ: they say nothing about which completion is better."""
        if not self.rewards:
            return True
        low, high = min(self.rewards), max(self.rewards)
        return not high > low + ROUNDING * max(abs(low), abs(high))


class Step(NamedTuple):
    number: int  #: optimiser step, from 1
    groups: list[PromptGroup]


@dataclass(frozen=True)
class CompletionFile:
    """A log, and which part of it is whole lines. Lines that a running stage adds later are not read."""

    path: Path
    size: int  #: bytes of whole lines
    torn: str | None  #: the text of a last line that breaks off


def open_log(path: Path) -> CompletionFile:
    """The log at `path`. A last line without its line break is whole if it is JSON all the same."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        start = _last_line_start(file, size)
        file.seek(start)
        rest = file.read(size - start)
    if not rest.strip():
        return CompletionFile(path, start, None)
    try:
        parse_json(rest, path, 1)
    except ValueError:
        return CompletionFile(path, start, rest.decode("utf-8", errors="replace"))
    return CompletionFile(path, size, None)


def read_steps(log: CompletionFile) -> Iterator[Step]:
    """The steps of a log, each complete. Raises ValueError, naming the line, for one that is not a completion."""
    step = Step(0, [])
    previous: dict[str, Any] = {}
    for number, row in _rows(log):
        if previous and row["step"] < previous["step"]:
            raise ValueError(
                f"{log.path}, line {number}: expected steps in order, found step {row['step']} after "
                f"{previous['step']}; restore the file, or continue the run from its last checkpoint"
            )
        if not previous or row["step"] != previous["step"]:
            if step.groups:
                yield step
            step = Step(row["step"], [])
        # A prompt can come twice in a step (the data began anew); its samples count up within each group.
        if not step.groups or row["prompt_id"] != previous["prompt_id"] or row["sample"] <= previous["sample"]:
            columns = row.get("columns") or {}
            step.groups.append(PromptGroup(str(row["prompt_id"]), tuple(row["images"]), row["prompt"], columns, []))
        elif any(row.get(name) != previous.get(name) for name in ("prompt", "images", "columns")):
            raise ValueError(
                f"{log.path}, line {number}: expected prompt, images and columns of the group's line before, found "
                "others; restore the file"
            )
        step.groups[-1].completions.append(_completion(row))
        previous = row
    if step.groups:
        yield step


def _rows(log: CompletionFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row)"""
    left = log.size
    with open(log.path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if left <= 0:
                return
            left -= len(line)
            where = f"{log.path}, line {number}"
            row = parse_json(line.removesuffix(b"\n"), log.path, number)
            check_shape(row, ROW, where)
            check_shape(row.get("nonfinite", {}), Values(str), f"{where}, nonfinite")
            check_shape(row.get("columns"), Maybe(dict), f"{where}, columns")
            for name, value in {**row["parts"], "reward": row["reward"], "advantage": row["advantage"]}.items():
                if value is not None and not _is_float(value):
                    raise ValueError(f"{where}, {name}: expected a number a float can hold, found a larger one")
            yield number, row


def _is_float(value: float) -> bool:
    # JSON puts no bound on a number: 1e999 is read as infinity, and a whole number stays one of any length.
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 2**1023


def _completion(row: dict[str, Any]) -> Completion:
    return Completion(
        sample=row["sample"],
        text=row["completion"],
        tokens=row["tokens"],
        stopped=row["stopped"],
        reward=row["reward"],
        parts=row["parts"],
        advantage=row["advantage"],
        nonfinite=row.get("nonfinite", {}),
    )


def _last_line_start(file: Any, size: int, block: int = 1 << 16) -> int:
    """Where the text after the last line break begins."""
    end = size
    while end > 0:
        start = max(0, end - block)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0
