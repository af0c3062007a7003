"""The rewards of a policy stage, built and checked before work starts, and the record of whose code they are.

A user's file is code that runs as the user. Its path is taken from the config that was named on the command line and
from nowhere else: a run folder's own copy of a config may have come from somebody else, so files that it names are not
run. `rewards.json` remembers the SHA-256 of every file; a run is not continued with another one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from vlmalign.rewards.contract import MemoryReward, Reward, required_columns
from vlmalign.rewards.user_file import load_user_reward
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.align.policy_config import Policy
from vlmalign.studies.align.read import RESERVED
from vlmalign.studies.align.reward_config import FileReward
from vlmalign.studies.align.run_folder import write_whole
from vlmalign.training.rollouts import Task

RECORD = "rewards.json"

#: reward -> what is called, and its weight
Rewards = Mapping[str, tuple[Reward | MemoryReward, float]]


class Built(NamedTuple):
    """The rewards of one stage."""

    rewards: Rewards
    files: dict[str, dict[str, str]]  #: reward -> path, function and SHA-256 of those that are code of the user's


def refuse_received(config: AlignConfig, source: Path) -> None:
    """Raises ValueError when `source`, the config's file, lies in a run folder or a checkpoint and names code."""
    if not config.runs_files:
        return
    for folder in source.resolve().parents:  # links followed: a link into a run folder is in the run folder
        run = (folder / "config.yaml").is_file() and (folder / "environment.json").is_file()
        if run or any(folder.glob("*.safetensors")):
            raise ValueError(
                f"{source} lies in the {'run folder' if run else 'checkpoint'} {folder} and names Python files as rewards, "
                "and code is never run on the word of such a folder: what it was received with would run as you. To "
                "continue a run give the config it was started with; to use this one, read it and the files it names, and "
                "copy it elsewhere"
            )


def build_rewards(stage: Policy) -> Built:
    """Raises ValueError for a file that cannot be used, and a function that is not there or is not a reward."""
    rewards: dict[str, tuple[Reward | MemoryReward, float]] = {}
    files = {}
    for name, reward in stage.rewards.items():
        if isinstance(reward, FileReward):
            found = load_user_reward(reward.path, reward.function, reward.sha256)
            files[name] = {"path": str(reward.path), "function": reward.function, "sha256": found.sha256}
            rewards[name] = (_with_options(name, found.reward, reward), reward.weight)
        else:
            rewards[name] = (reward.build(), reward.weight)
    return Built(rewards, files)


def _with_options(name: str, reward: Reward | MemoryReward, section: FileReward) -> Reward | MemoryReward:
    if not section.options:
        return reward
    if isinstance(reward, MemoryReward):
        raise ValueError(f"reward {name!r} is a MemoryReward, which takes no options; build it with them in the file")
    return partial(reward, **section.options)


def check_columns(stage: Policy, rewards: Rewards, tasks: Sequence[Task], path: Path) -> None:
    """Raises ValueError when the data lacks a column that a reward needs, or has one that is also an option."""
    found = set(tasks[0].columns) if tasks else set()
    for name, (reward, _) in rewards.items():
        if isinstance(reward, MemoryReward):  # it asks for columns by itself, when it is called
            continue
        missing = [column for column in required_columns(reward, name) if column not in found | set(RESERVED)]
        if missing:
            has = ", ".join(sorted(found)) or "no columns beside messages"
            raise ValueError(
                f"{path}: reward {name!r} needs the column {missing[0]!r}, found {has}; add it to every row"
            )
        if both := sorted(found & set(stage.rewards[name].options)) if isinstance(reward, partial) else []:
            raise ValueError(f"{path}: reward {name!r} has an option {both[0]!r}, which is also a column; rename one")


def remember(config: AlignConfig, built: Mapping[int, Built]) -> None:
    """Write the record, or check that the run was begun with the same files. `built` is by number of the stage.

    Raises:
        ValueError: naming the file that has changed.
    """
    now = {config.folder(index).name: stage.files for index, stage in built.items() if stage.files}
    path = config.run / RECORD
    if not path.exists():
        if now:
            write_whole(path, json.dumps(now, indent=1) + "\n")
        return
    then = json.loads(path.read_text(encoding="utf-8"))
    for stage, files in now.items():
        for name, file in files.items():
            before = then.get(stage, {}).get(name, {}).get("sha256")
            if before != file["sha256"]:
                raise ValueError(
                    f"the file of reward {name!r} of stage {stage}, {file['path']}, has changed since the run began: "
                    f"SHA-256 {file['sha256']}, then {before}; restore it to continue, or choose a new run folder"
                )
