"""The rewards of a policy stage: ready ones by their name in the table, and the user's own from a Python file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, field_validator, model_validator

from vlmalign.config import FREE, Config
from vlmalign.config_tree import nearest
from vlmalign.rewards.contract import MemoryReward, Reward
from vlmalign.rewards.rewards import REWARDS, REWARDS_WITH_MEMORY
from vlmalign.studies.engine.sections import Positive
from vlmalign.tasks.labels import LabelsTask
from vlmalign.tasks.tasks import AnyTask

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

    @field_validator("sha256")
    @classmethod
    def _a_digest(cls, sha256: str | None) -> str | None:
        if sha256 is not None and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"sha256 must be 64 hexadecimal digits, found {sha256!r}")
        return sha256


class TableReward(Config):
    """A reward of `rewards.rewards`; `options` are its arguments."""

    kind: Literal[*REWARDS, *REWARDS_WITH_MEMORY]
    weight: Weight = 1.0  #: 0: logged only
    options: dict[str, Any] = Field(default_factory=dict)

    def build(self, task: AnyTask | None = None) -> Reward | MemoryReward:
        """The reward; labels that its options do not give are those that `task` reads.

        Raises:
            ValueError: for options it does not have, values out of range, and labels that nobody gives.
        """
        make, options = {**REWARDS, **REWARDS_WITH_MEMORY}[self.kind], dict(self.options)
        if "labels" not in options and "labels" in self._known and isinstance(task, LabelsTask):
            options["labels"] = task.reader
        if missing := [name for name, p in self._known.items() if p.default is p.empty and name not in options]:
            raise ValueError(f"reward {self.kind} needs options.{missing[0]}")
        # YAML has lists only; rewards keep their label schemas as tuples.
        try:
            return make(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
        except (TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"options of reward {self.kind} do not fit: {error}") from error

    @property
    def _known(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature({**REWARDS, **REWARDS_WITH_MEMORY}[self.kind]).parameters

    @model_validator(mode="after")
    def _can_be_built(self) -> TableReward:
        known = self._known
        if unknown := [name for name in self.options if name not in known]:
            raise ValueError(
                f"options.{unknown[0]}: reward {self.kind} has no such option; the nearest is "
                f"{nearest(unknown[0], list(known))!r}"
            )
        hints = get_type_hints({**REWARDS, **REWARDS_WITH_MEMORY}[self.kind])
        for name, value in self.options.items():
            _check_option(name, value, hints.get(name, Any))
        if "labels" not in known or "labels" in self.options:  # else the task of the stage gives them
            self.build()
        return self


def _check_option(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError, naming the option, for a value of another type than the reward takes."""
    if hint is Any:
        return
    types = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    try:
        types.validate_python(_tuples(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in (name, *first["loc"]) if isinstance(part, int) or part == name)
        raise ValueError(
            f"options.{place}: {first['msg'].replace('Input should be', 'expected')}, found {value!r}"
        ) from None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


AnyReward = Annotated[FileReward | TableReward, Field(discriminator="kind")]


class Scoring(Config):
    """Where rewards run; see `rewards.runner`."""

    workers: Annotated[int, Field(ge=0)] = 1  #: processes; 0: in the training process, where one that hangs hangs it
    chunk: Positive = 16  #: completions per call
    timeout_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0  #: seconds per call
