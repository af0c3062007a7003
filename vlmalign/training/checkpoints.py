"""Checkpoints that a killed run continues from bit for bit: all that changes between steps, written whole or not at all.

Every process writes the parts that its devices hold, process 0 the rest, into one folder that all of them see. A
checkpoint is restored onto any mesh and any number of processes: each array goes where the state it is for lives.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from vlmalign.distributed import process_count
from vlmalign.exchange import from_first
from vlmalign.training.step import TrainState


class Restored(NamedTuple):
    """The newest whole checkpoint."""

    state: TrainState
    position: dict[str, Any]  #: where data, metrics and rewards with memory stood


class Checkpoints:
    """The newest `keep` checkpoints of one stage (orbax: written beside, then renamed, so never half there)."""

    def __init__(self, folder: Path, *, keep: int = 2):
        # Named processes wait for each other by messages; unnamed ones by a program on all devices, which may cross
        # another one that is still running.
        processes = ocp.options.MultiprocessingOptions(active_processes=set(range(process_count())))
        from_first(lambda: folder.mkdir(parents=True, exist_ok=True))
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, create=False, multiprocessing_options=processes
        )
        self.folder = folder
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def save(self, state: TrainState, position: Mapping[str, Any]) -> None:
        """Write the state after `state.step` updates with its JSON position."""
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()),
            position=ocp.args.JsonSave(dict(position)),
            shapes=ocp.args.JsonSave(_shapes(state)),
        )
        self._manager.save(int(state.step), args=arguments)

    def restore(self, like: TrainState) -> Restored | None:
        """The newest checkpoint, with shapes, dtypes and shardings as in `like`; None when there is none.

        Raises:
            ValueError: when it holds other parameters (the model, adapter or optimiser settings were changed).
        """
        step = from_first(self._manager.latest_step)
        if step is None:
            return None
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
        for found in [s for s in self._manager.all_steps() if s > step]:
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
