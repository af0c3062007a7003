"""Checkpoints that a killed run continues from bit for bit: all that changes between steps, written whole or not at all,
and read again only as it was written: the SHA-256 of every file is kept with it.

Every process writes the parts that its devices hold, process 0 the rest, into one folder that all of them see. A
checkpoint is restored onto any mesh and any number of processes: each array goes where the state it is for lives.
Processes share out what is to be hashed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from vlmalign.distributed import own_share, process_count
from vlmalign.exchange import from_first, gather_from
from vlmalign.training.step import TrainState

#: in a checkpoint: its files, their sizes and SHA-256. One without it was never finished
FILES = "files.json"
#: beside the checkpoints: those that are damaged, kept and never read
DAMAGED = "damaged"


class Restored(NamedTuple):
    """The newest whole checkpoint."""

    state: TrainState
    position: dict[str, Any]  #: where data, metrics and rewards with memory stood


class _Manager(ocp.CheckpointManager):
    """orbax's, which leaves it to `stopping` to ask JAX whether the run is to end: JAX says so once."""

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The newest `keep` checkpoints of one stage (orbax: written beside, then renamed, so never half there)."""

    def __init__(self, folder: Path, *, keep: int = 2, say: Callable[[str], None] = print):
        """`say` is told of checkpoints that are left out since they are damaged."""
        # Named processes wait for each other by messages; unnamed ones by a program on all devices, which may cross
        # another one that is still running.
        processes = ocp.options.MultiprocessingOptions(active_processes=set(range(process_count())))
        from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=False, multiprocessing_options=processes
        )
        self.folder = folder
        self._say = say
        self._manager = _Manager(folder.resolve(), options=options)

    def save(self, state: TrainState, position: Mapping[str, Any]) -> None:
        """Write the state after `state.step` updates with its JSON position."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            position=ocp.args.JsonSave(dict(position)),
            shapes=ocp.args.JsonSave(_shapes(state)),
        )
        step = int(state.step)
        from_first(lambda: self._require_space(step, state))
        self._manager.save(step, args=arguments)
        files = _hashed(self.folder / str(step))
        from_first(lambda: _write_files(self.folder / str(step), files))

    def _require_space(self, step: int, state: TrainState) -> None:
        """Raises OSError where the checkpoint would fill the disk: half of one would have to be found out later."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state._asdict())) * 1.05 + 2**20
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"no space for the checkpoint of update {step}: it needs about {needed / 2**20:.1f} MiB, and "
                f"{free / 2**20:.1f} MiB are free; make room, and the same command goes on",
                str(self.folder),
            )

    def steps(self) -> list[int]:
        """The updates after which there are checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def problem(self, step: int) -> str | None:
        """What is wrong with a checkpoint: a file that is missing or not as it was written; None for a whole one."""
        folder = self.folder / str(step)
        found = from_first(lambda: _read_files(folder))
        if isinstance(found, str):
            return found
        there = {name: entry for name, *entry in _hashed(folder)}
        for name, *entry in found:
            if name not in there:
                return f"{folder / name} is missing"
            if there[name] != entry:
                size = "" if there[name][0] == entry[0] else f", {there[name][0]} bytes of {entry[0]}"
                return f"{folder / name} is not as it was written{size}"
        return None

    def restore(self, like: TrainState) -> Restored | None:
        """The newest whole checkpoint, with shapes, dtypes and shardings as in `like`; None when there is none. Newer ones
        that are damaged are named, and set aside.

        Raises:
            ValueError: when it holds other parameters (the model, adapter or optimiser settings were changed), and when
                there are only damaged ones.
        """
        damaged = {}
        for step in reversed(from_first(self.steps)):
            problem = self.problem(step)
            if problem is None:
                self._leave_out(damaged, f"going on from that of update {step}")
                return self._restore(step, like)
            damaged[step] = problem
        if damaged:
            told = "; ".join(damaged.values())
            raise ValueError(
                f"no checkpoint in {self.folder} is whole: {told}. Restore these files, or remove {self.folder} to begin "
                "the stage anew"
            )
        return None

    def _leave_out(self, damaged: Mapping[int, str], instead: str) -> None:
        """Move damaged checkpoints aside: steps that are made again are saved again."""
        if not damaged:
            return

        def move() -> None:
            folder = self.folder / DAMAGED
            folder.mkdir(exist_ok=True)
            for step, problem in damaged.items():
                self._say(f"the checkpoint of update {step} is left out: {problem}; {instead}")
                number = sum(1 for _ in folder.glob(f"{step}-*"))
                (self.folder / str(step)).rename(folder / f"{step}-{number}")

        from_first(move)
        self._manager.reload()

    def _restore(self, step: int, like: TrainState) -> Restored:
        found = self._manager.restore(step, args=ocp.args.Composite(shapes=ocp.args.JsonRestore()))["shapes"]
        expected = _shapes(like)
        differ = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        if differ:
            name = differ[0]
            raise ValueError(
                f"the checkpoint in {self._manager.directory} is of another model, adapter or optimiser: "
                f"{len(differ)} arrays differ, such as {name}, which is {found.get(name, 'absent')} there and "
                f"{expected.get(name, 'absent')} here; go back to the settings of that run or choose a new run folder"
            )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like._asdict())
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), position=ocp.args.JsonRestore())
        found = self._manager.restore(step, args=arguments)
        return Restored(TrainState(**found["state"]), found["position"])

    def drop_after(self, step: int) -> None:
        """Delete what was saved after this many updates."""
        for found in [s for s in self.steps() if s > step]:
            self._manager.delete(found)

    def close(self) -> None:
        self._manager.close()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _shapes(state: TrainState) -> dict[str, str]:
    """Shape and dtype of every array by its path, compared before anything is read."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state._asdict())
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in flat}


def _hashed(folder: Path) -> list[list[Any]]:
    """[name, bytes, SHA-256] of every file below a folder; each process reads its share of them."""
    names = from_first(
        lambda: sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    )
    wanted = [name for name in names if name != FILES]

    def read() -> Sequence[list[Any]]:
        own = own_share(wanted)
        with ThreadPoolExecutor(max_workers=4) as threads:  # hashing lets go of the interpreter
            return list(threads.map(lambda name: [name, *_hash(folder / name)], own))

    return gather_from(read)


def _hash(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()


def _write_files(folder: Path, files: Sequence[Sequence[Any]]) -> None:
    partial = folder / f"{FILES}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(files, file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(folder / FILES)


def _read_files(folder: Path) -> list[list[Any]] | str:
    """What `_write_files` wrote, or what is wrong with it."""
    try:
        found = json.loads((folder / FILES).read_text(encoding="utf-8"))
        if isinstance(found, list) and all(isinstance(entry, list) and len(entry) == 3 for entry in found):
            return found
    except FileNotFoundError:
        return f"{folder / FILES} is missing"
    except (ValueError, RecursionError):
        pass
    return f"{folder / FILES} is damaged"
