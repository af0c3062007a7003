"""Rewards from a user's own Python file: loaded by path, known by hash, checked before a run starts.

A path to code must come from the config that the user named on the command line, and from nowhere else: the caller
takes it from there, never from a run folder's config or a checkpoint, which may come from somebody else. Files that
lie inside such folders are refused here.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from vlmalign.rewards.contract import MemoryReward, Reward, is_async, required_columns, text_of

#: what a run folder's config is called, in this layout and in earlier ones, and what else a run writes beside it
CONFIGS = ("study.yaml", "config.yaml")
RUN_PARTS = (
    "environment.json", "timing.jsonl", ".hashes.json", ".owners", "stages", "sets", "sources", "answers", "scores", "measured",
    "probes", "report.html", "set-aside", "data.json", "metrics.jsonl",
)  # fmt: skip
#: column with the turns of each prompt, where a reward is called with messages
TURNS = "prompt_messages"


class UserReward(NamedTuple):
    """What was loaded; the hash goes into the run's record."""

    reward: Reward | MemoryReward
    sha256: str  #: of the file's bytes
    path: Path


@dataclass(frozen=True)
class FileFunction:
    """A function of a user file as a reward that pickles: it carries the file's source, so that every worker, also one
    started hours later, runs the bytes that were hashed, whatever has become of the file."""

    path: Path
    name: str
    sha256: str
    source: bytes = field(repr=False)

    @property
    def __wrapped__(self) -> Reward:
        """The function itself, where `inspect.signature` looks for it: its columns are this reward's."""
        return getattr(_module(self.path, self.sha256, self.source), self.name)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        return self.__wrapped__(prompts=prompts, completions=completions, **columns)


@dataclass(frozen=True)
class OnMessages:
    """A reward that is called as TRL calls one with conversations: prompts are lists of turns, and a completion is a list
    of one, `[{"role": "assistant", "content": text}]`."""

    reward: Reward

    @property
    def __wrapped__(self) -> Reward:
        return self.reward

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> Any:
        turns = columns.pop(TURNS, None) or [[{"role": "user", "content": prompt}] for prompt in prompts]
        answers = [[{"role": "assistant", "content": text_of(completion)}] for completion in completions]
        return self.reward(prompts=turns, completions=answers, **columns)


def load_user_reward(
    path: str | Path, name: str, expected_hash: str | None = None, *, trusted: bool = False
) -> UserReward:
    """The reward `name` of the Python file `path`: a function with a reward's signature, sync or async, or a
    `MemoryReward`.

    It may import modules that lie beside it; its hash says nothing of them. Its code runs here, once, and in every worker.

    Raises ValueError when the file is missing, lies inside a run folder or a checkpoint (unless it is `trusted`), does not have the SHA-256
    `expected_hash`, cannot be run, has no such function, or has one that cannot be called as rewards are.
    """
    path = Path(path).resolve()  # links followed: a link into a run folder is in the run folder
    if not path.is_file():
        raise ValueError(f"expected a Python file with rewards, found no file at {path}; check the config's path")
    if not trusted:
        _refuse_untrusted(path)
    source = path.read_bytes()
    digest = hashlib.sha256(source).hexdigest()
    if expected_hash is not None and digest != expected_hash.lower():
        raise ValueError(
            f"{path} has SHA-256 {digest}, expected {expected_hash}: the file is not the one the config was written "
            "for; look at what changed, then put its hash into the config"
        )
    try:
        module = _module(path, digest, source)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{path} cannot be run: {type(error).__name__}: {error}; run it with Python to see") from error
    if name not in vars(module):
        known = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise ValueError(f"{path} has no reward {name!r}, found {known}; name one of them or define it")
    reward = vars(module)[name]
    if isinstance(reward, MemoryReward):
        return UserReward(reward, digest, path)
    if not callable(reward):
        raise ValueError(f"{name!r} in {path} must be a function or a MemoryReward, found {type(reward).__name__}")
    required_columns(reward, f"{path.name}:{name}")
    if is_async(reward):  # awaited in the main process: never pickled
        return UserReward(reward, digest, path)
    return UserReward(FileFunction(path, name, digest, source), digest, path)


def _refuse_untrusted(path: Path) -> None:
    for folder in path.parents:
        kind = received(folder)
        if kind is not None:
            raise ValueError(
                f"{path} lies in the {kind} {folder}, and code is never run from there: what a run or a model was "
                "received with would run as you; read the file, and copy it beside your config, or say --trust-code"
            )


def received(folder: Path) -> str | None:
    """What a folder is that may have come from somebody else: a run folder or a checkpoint; None for any other.

    A run folder is known by its config with anything else of a run, so that leaving files out hides nothing.
    """
    if any((folder / name).is_file() for name in CONFIGS) and any((folder / name).exists() for name in RUN_PARTS):
        return "run folder"
    if (folder / "_CHECKPOINT_METADATA").is_file() or any(folder.glob("*.safetensors")):
        return "checkpoint"
    return None


class _Source(importlib.abc.InspectLoader):
    """Gives a module exactly these bytes: reading the file again could give others than were hashed."""

    def __init__(self, path: Path, source: bytes):
        self._path, self._bytes = path, source

    def get_source(self, fullname: str) -> str:
        del fullname
        return importlib.util.decode_source(self._bytes)

    def get_code(self, fullname: str) -> Any:
        return self.source_to_code(self.get_source(fullname), str(self._path))


@lru_cache(maxsize=32)
def _module(path: Path, sha256: str, source: bytes) -> ModuleType:
    """The file as a module, run once a process."""
    spec = importlib.util.spec_from_loader(f"vlmalign_user_{sha256[:16]}", _Source(path, source), origin=str(path))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    module.__file__ = str(path)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: a file beside a reward must not stand for an installed module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
