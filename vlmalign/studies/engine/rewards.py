"""The rewards of a policy stage, built and checked before work starts, and whose code runs.

A user's file is code that runs as the user. Its path is taken from the config that was named on the command line and
from nowhere else: a run folder's own copy of a config may have come from somebody else, so files that it names are not
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.rewards.contract import MemoryReward, Reward, is_async, required_columns
from vlmalign.rewards.user_file import OnMessages, load_user_reward, received
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.reward_config import FileReward, Rewards, TableReward, Truth
from vlmalign.studies.engine.stage_config import Policy
from vlmalign.studies.engine.texts import RESERVED, Texts
from vlmalign.tasks.tasks import AnyTask


class Built(NamedTuple):
    """The rewards of one stage."""

    rewards: Rewards
    files: dict[str, str]  #: "rewards.NAME" -> SHA-256 of the file with its code


def refuse_received(config: StudyConfig, source: Path) -> None:
    """Raises ValueError when `source`, the config's file, lies in a run folder or a checkpoint and names code."""
    if not config.runs_files:
        return
    for folder in source.resolve().parents:  # links followed: a link into a run folder is in the run folder
        kind = received(folder)
        if kind is not None:
            raise ValueError(
                f"{source} lies in the {kind} {folder} and names Python files as rewards, "
                "and code is never run on the word of such a folder: what it was received with would run as you. To "
                "continue a run give the config it was started with; to use this one, read it and the files it names, and "
                "copy it elsewhere, or say --trust-code"
            )


def build_rewards(stage: Policy, task: AnyTask, where: str, *, trusted: bool) -> Built:
    """`where` is the stage's place in the config; `trusted`: code runs wherever it lies.

    Raises:
        ValueError: for a file that cannot be used, a function that is not there or is not a reward, and options that do
            not fit.
    """
    rewards: dict[str, tuple[Reward | MemoryReward, float]] = {}
    files = {}
    for name, reward in stage.rewards.items():
        if isinstance(reward, FileReward):
            found = load_user_reward(reward.path, reward.function, reward.sha256, trusted=trusted)
            files[f"rewards.{name}"] = found.sha256
            rewards[name] = (_with_options(name, found.reward, reward), reward.weight)
        else:
            try:
                rewards |= reward.build(name, task)
            except ValueError as error:
                raise ValueError(f"{where}.rewards.{name}: {error}") from error
    return Built(rewards, files)


def count_labels(built: Built, stage: Policy, task: AnyTask, truth: Truth, where: str) -> Built:
    """The rewards with the frequencies of labels that they leave to the set that the stage trains on.

    Raises:
        ValueError: where no film of it has a truth.
    """
    found = dict(built.rewards)
    for name, reward in stage.rewards.items():
        if isinstance(reward, TableReward) and reward.counts_labels:
            try:
                found |= reward.build(name, task, truth)
            except ValueError as error:
                raise ValueError(f"{where}.rewards.{name}: {error}") from error
    return built._replace(rewards=found)


def _with_options(name: str, reward: Reward | MemoryReward, section: FileReward) -> Reward | MemoryReward:
    if not section.options and section.form == "text":
        return reward
    if isinstance(reward, MemoryReward):
        raise ValueError(
            f"reward {name!r} is a MemoryReward, which takes no options and no form; build it with them in the file"
        )
    if section.form == "messages":
        if is_async(reward):
            raise ValueError(f"reward {name!r} is async, and gets text; take that, or leave `async` out")
        reward = OnMessages(reward)
    return partial(reward, **section.options) if section.options else reward


def needs_turns(stage: Policy) -> bool:
    """Whether a reward of the stage is given prompts as lists of turns."""
    return any(isinstance(reward, FileReward) and reward.form == "messages" for reward in stage.rewards.values())


def check_columns(stage: Policy, rewards: Rewards, questions: Texts, where: str) -> None:
    """Raises ValueError when the data lacks a column that a reward needs, or has one that is also an option."""
    tasks: Sequence[Any] = questions.items
    found = set(tasks[0].columns) if tasks else set()
    for name, (reward, _) in rewards.items():
        if isinstance(reward, MemoryReward):  # it asks for columns by itself, when it is called
            continue
        missing = [column for column in required_columns(reward, name) if column not in found | set(RESERVED)]
        if missing:
            has = ", ".join(sorted(found)) or "no columns beside messages"
            raise ValueError(
                f"{where}: reward {name!r} needs the column {missing[0]!r}, found {has}; add it to every row"
            )
        if both := sorted(found & set(stage.rewards[name].options)) if isinstance(reward, partial) else []:
            raise ValueError(f"{where}: reward {name!r} has an option {both[0]!r}, which is also a column; rename one")
