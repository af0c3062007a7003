"""The rewards of a policy stage: ready ones by their name in the table, and the user's own from a Python file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from vlmalign.config import FREE, Config
from vlmalign.config_tree import nearest
from vlmalign.rewards.contract import MemoryReward, Reward
from vlmalign.rewards.frequency import counted
from vlmalign.rewards.rewards import REWARD_SETS, REWARDS, REWARDS_WITH_MEMORY, SET_PARTS
from vlmalign.studies.engine.sections import Positive
from vlmalign.tasks.label_reader import label_reader
from vlmalign.tasks.labels import LabelsTask
from vlmalign.tasks.tasks import AnyTask

#: name -> reward and its weight
Rewards = Mapping[str, tuple[Reward | MemoryReward, float]]

#: the true labels of films, None for a film of another task
Truth = Iterable[Iterable[str] | None]

TABLE: Mapping[str, Callable[..., Any]] = MappingProxyType({**REWARDS, **REWARDS_WITH_MEMORY, **REWARD_SETS})

#: beyond a million a reward would drown all others, and at last the range of floats
Weight = Annotated[float, Field(allow_inf_nan=False, ge=-1e6, le=1e6)]


class FileReward(Config):
    """A function of the user's own: `def name(prompts, completions, **columns) -> list[float | None]`, sync or async, or
    a `MemoryReward`. Its code runs, so it is taken only from the config that was named on the command line."""

    kind: Literal["file"]
    path: Annotated[Path, FREE]
    function: str
    weight: Weight = 1.0  #: 0: logged only
    options: dict[str, Any] = Field(default_factory=dict)  #: keyword arguments of every call
    form: Literal["text", "messages"] = "text"  #: messages: prompts and completions as TRL gives those of conversations
    sha256: str | None = None  #: of the file; another file is refused

    def names(self, name: str) -> list[str]:
        """What the reward is called: as the config calls it."""
        return [name]

    @field_validator("sha256")
    @classmethod
    def _a_digest(cls, sha256: str | None) -> str | None:
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, found {sha256!r}")
        return sha256


class TableReward(Config):
    """A reward, or a set of rewards, of `rewards.rewards`; `options` are its arguments."""

    kind: Literal[*TABLE]
    weight: Weight = 1.0  #: 0: logged only; the rewards of a set have weights of their own, which it multiplies
    options: dict[str, Any] = Field(default_factory=dict)

    def names(self, name: str) -> list[str]:
        """What the rewards are called where the config calls them `name`: the same, and of a set NAME_PART."""
        return [f"{name}_{part}" for part in SET_PARTS[self.kind]] if self.kind in SET_PARTS else [name]

    def build(self, name: str, task: AnyTask | None = None, truth: Truth | None = None) -> Rewards:
        """The rewards by `names`, with their weights.

        Labels, and the label that excludes all others, are those that `task` reads, unless the options give them. `truth`
        are the labels of the films that the stage trains on, in which `frequency: training` is counted.

        Raises:
            ValueError: for options it does not have, values out of range, and labels that nobody gives.
        """
        # YAML has lists only; rewards keep their label schemas as tuples.
        options = {key: tuple(value) if isinstance(value, list) else value for key, value in self.options.items()}
        needed = [option for option, p in self._known.items() if p.default is p.empty and option not in options]
        if isinstance(task, LabelsTask):
            given = {"labels": task.reader, "normal": task.excludes}
            options |= {option: given[option] for option in needed if given.get(option) is not None}
        if missing := [option for option in needed if option not in options]:
            raise ValueError(f"reward {self.kind} needs options.{missing[0]}")
        if truth is not None and self.counts_labels:
            options["frequency"] = counted(label_reader(options["labels"]).labels, truth)
        try:
            made = TABLE[self.kind](**options)
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"options of reward {self.kind} do not fit: {error}") from error
        if self.kind not in SET_PARTS:
            return {name: (made, self.weight)}
        return {f"{name}_{part}": (reward, self.weight * weight) for part, (reward, weight) in made.items()}

    @property
    def counts_labels(self) -> bool:
        """Whether a study counts the labels that its stage trains on for it."""
        option = self._known.get("frequency")
        return option is not None and self.options.get("frequency", option.default) == "training"

    @property
    def _known(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(TABLE[self.kind]).parameters

    @model_validator(mode="after")
    def _can_be_built(self) -> TableReward:
        known = self._known
        if unknown := [name for name in self.options if name not in known]:
            raise ValueError(
                f"options.{unknown[0]}: reward {self.kind} has no such option; the nearest is "
                f"{nearest(unknown[0], list(known))!r}"
            )
        hints = get_type_hints(TABLE[self.kind])
        for name, value in self.options.items():
            _check_option(name, value, hints.get(name, Any))
        of_task = [name for name in ("labels", "normal") if name in known and known[name].default is known[name].empty]
        if all(name in self.options for name in of_task):  # else the task of the stage gives them
            self.build("reward")
        return self


#: pydantic's words for an option that could also be an object, which no config can give
_OBJECTS = ("is_instance_of", "dataclass_exact_type", "dataclass_type")


def _check_option(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError, naming the option, for a value of another type than the reward takes."""
    if hint is Any:
        return
    types = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        types.validate_python(_tuples(value), strict=True)
    except ValidationError as error:
        # Of an option that may be several things, what is said of those that fit best: where the mistake lies deepest.
        depth = max(len(each["loc"]) for each in error.errors())
        found = [each for each in error.errors() if len(each["loc"]) == depth and each["type"] not in _OBJECTS]
        first = found[0]
        place = ".".join(str(part) for part in (name, *first["loc"]) if isinstance(part, int) or part == name)
        wanted = " or ".join(dict.fromkeys(each["msg"].removeprefix("Input should be ") for each in found))
        said = f"expected {wanted}" if first["msg"].startswith("Input should be ") else first["msg"]
        raise ValueError(f"options.{place}: {said}, found {value!r}") from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


AnyReward = Annotated[FileReward | TableReward, Field(discriminator="kind")]


class Scoring(Config):
    """Where rewards run; see `rewards.runner`."""

    workers: Annotated[int, Field(ge=0)] = 1  #: processes; 0: in the training process, where one that hangs hangs it
    chunk: Positive = 16  #: completions per call
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0  #: seconds per call
