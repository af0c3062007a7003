"""The rows of every stage, read and checked before the first one begins, and what was left out of them, on record.

A stage's folder gets `data.json` (files with their SHA-256 and counts) and `left_out.jsonl` (every row that was skipped or
cut short, with the reason). A run is continued with the same files only, and leaves the same rows out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.data.chat.chat import Chat
from vlmalign.progress import Progress
from vlmalign.studies.align.config import AlignConfig, AnyStage
from vlmalign.studies.align.data_config import Rows
from vlmalign.studies.align.policy_config import Policy
from vlmalign.studies.align.read import (
    LeftOut,
    Read,
    decode_once,
    read_conversations,
    read_pairs,
    read_prompts,
)
from vlmalign.studies.align.rewards import Built, check_columns
from vlmalign.studies.align.run_folder import write_whole
from vlmalign.training.rollouts import Task
from vlmalign.types import Group

RECORD, LEFT_OUT = "data.json", "left_out.jsonl"

#: kind of stage -> what reads its files
READERS: Mapping[str, Callable[..., Read]] = {
    "sft": read_conversations,
    "dpo": read_pairs,
    "grpo": read_prompts,
    "ppo": read_prompts,
}


class StageData(NamedTuple):
    """What one stage trains and is validated on: groups, or tasks for a policy stage."""

    train: list[Any]
    validation: list[Any]
    record: dict[str, dict[str, Any]]  #: set -> its file, SHA-256 and counts
    left_out: dict[str, list[LeftOut]]  #: set -> rows that were skipped or cut short

    @property
    def images(self) -> int:
        """Most distinct images of a group."""
        groups: list[Group] = [item.prompt if isinstance(item, Task) else item for item in self.train + self.validation]
        return max(len(group.images) for group in groups)


def prepare(config: AlignConfig, chat: Chat, built: Mapping[int, Built], progress: Progress) -> list[StageData]:
    """Every stage's rows. `built` are the rewards by number of the stage.

    Raises:
        ValueError: naming file and line of a row that cannot be used, a column that a reward needs, or a file that has
            changed since the run began; and when a file has fewer rows than an update takes.
    """
    found = []
    for index, stage in enumerate(config.stages):
        data = _read(stage, config.folder(index), chat)
        where = f"stage {index + 1} ({stage.kind})"
        needed, name = (stage.prompts, "prompts") if isinstance(stage, Policy) else (stage.batch, "batch")
        if len(data.train) < needed:
            raise ValueError(
                f"{where}: {stage.data.path} gives {len(data.train)} rows, fewer than {name} = {needed}"
                f"{_because(data.left_out['train'])}"
            )
        if stage.validation is not None and not data.validation:
            raise ValueError(
                f"{where}: {stage.validation.data.path} gives no row to validate on{_because(data.left_out['validation'])}"
            )
        if isinstance(stage, Policy):
            check_columns(stage, built[index].rewards, data.train, stage.data.path)
            if stage.validation is not None:
                check_columns(stage, built[index].rewards, data.validation, stage.validation.data.path)
        progress.say(f"{where}: {_counts(data)}")
        found.append(data)
    return found


def remember(config: AlignConfig, data: list[StageData]) -> None:
    """Write down what every stage reads and leaves out, unless an earlier start of the run has."""
    for index, stage in enumerate(data):
        folder = config.folder(index)
        if (folder / RECORD).exists():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"set": name, **left._asdict()} for name, part in stage.left_out.items() for left in part]
        write_whole(folder / LEFT_OUT, "".join(json.dumps(row) + "\n" for row in rows))
        # The record last: its presence says that the other is whole.
        write_whole(folder / RECORD, json.dumps(stage.record, indent=1) + "\n")


def _read(stage: AnyStage, folder: Path, chat: Chat) -> StageData:
    files: dict[str, Rows] = {"train": stage.data}
    if stage.validation is not None:
        files["validation"] = stage.validation.data
    begun = (folder / RECORD).exists()
    then = json.loads((folder / RECORD).read_text(encoding="utf-8")) if begun else {}
    # Images were decoded once, when the run began, and rows that had a bad one are known.
    check = (lambda key: None) if begun else decode_once()
    found = StageData([], [], {}, {})
    for name, rows in files.items():
        if not rows.path.is_file():
            raise ValueError(f"there is no file {rows.path}; the working directory is {Path.cwd()}")
        digest = _sha256(rows.path)
        if begun and digest != then[name]["sha256"]:
            raise ValueError(
                f"{rows.path} has changed since the run began: SHA-256 {digest}, then {then[name]['sha256']}; restore it "
                "to continue, or choose a new run folder"
            )
        read = READERS[stage.kind](rows, chat, check, _skipped(folder, name) if begun else {})
        (found.train if name == "train" else found.validation).extend(read.items)
        found.left_out[name] = read.left_out
        found.record[name] = {"path": str(rows.path), "sha256": digest, "used": len(read.items), **_left(read.left_out)}
    return found


def _skipped(folder: Path, name: str) -> dict[str, LeftOut]:
    rows = [json.loads(line) for line in (folder / LEFT_OUT).read_text(encoding="utf-8").splitlines()]
    found = [LeftOut(row["name"], row["what"], row["reason"]) for row in rows if row["set"] == name]
    return {left.name: left for left in found if left.what == "skipped"}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _left(left_out: list[LeftOut]) -> dict[str, int]:
    return {what: sum(left.what == what for left in left_out) for what in ("skipped", "truncated")}


def _because(left_out: list[LeftOut]) -> str:
    if not left_out:
        return ""
    return f" ({len(left_out)} were left out or cut, such as {left_out[0].name}: {left_out[0].reason})"


def _counts(data: StageData) -> str:
    """
    >>> _counts(StageData([], [], {"train": {"path": "a.jsonl", "used": 9, "skipped": 1, "truncated": 0}}, {}))
    '9 rows of a.jsonl (1 skipped)'
    """
    parts = []
    for record in data.record.values():
        left = ", ".join(f"{record[what]} {what}" for what in ("skipped", "truncated") if record[what])
        parts.append(f"{record['used']} rows of {record['path']}" + (f" ({left})" if left else ""))
    return ", ".join(parts)
