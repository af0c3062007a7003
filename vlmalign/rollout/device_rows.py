"""The device's side of a rollout: weights, the caches of the rows that run, and the programs that are called on them.

Every program has one of a few shapes (`compaction.decode_shapes`). On a mesh, rows are shared out over its devices and
stay there; the host sees nothing but the tokens that a block drew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlmalign.mesh import on_mesh, put_batch, put_rows, put_whole
from vlmalign.models.attention import KeyValue
from vlmalign.models.model import Model, Params
from vlmalign.rollout import cache as programs
from vlmalign.rollout.compaction import DecodeShape, Moves
from vlmalign.rollout.engine import Cache, Drawn, Prefilled, Rows
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.slots import Slots
from vlmalign.shapes import Int, Key
from vlmalign.types import GroupBatch


class DeviceRows:
    """Rows of prompts of one padded length, and their completions' caches."""

    def __init__(
        self,
        model: Model,
        params: Params,
        key: Key[jax.Array, ""],
        *,
        prompt: int,
        steps: int,
        sampling: Sampling,
        mesh: Mesh | None,
    ):
        """`prompt` and `steps` are tokens: the padded length of prompts, and how many a block draws."""
        devices = next(iter(params.values())).sharding.device_set
        self._device = next(iter(devices)) if mesh is None and len(devices) == 1 else None
        self._model, self._mesh = model, mesh
        self._params = self._commit(params)
        self._key = put_whole(self._commit(key), mesh)
        self._prompt, self._steps, self._sampling = prompt, steps, sampling
        #: of `Rows`: what the host had when it last sent it, and what the device has
        self._sent: dict[str, tuple[np.ndarray, Any]] = {}

    def open(self, shape: DecodeShape) -> None:
        """Empty rows of this shape, in place of those there were."""
        self.shape = shape
        # The old caches go before new ones come.
        self._cache: Cache | None = None
        self._shared: list[KeyValue] | None = None
        self._cache, self._shared = self._commit(
            self._call(programs.empty_program, self._model, shape=shape, prompt=self._prompt)
        )

    def insert(self, batch: GroupBatch, rows: Int[np.ndarray, "m"]) -> None:
        """Compute the prompts of a batch, and put the first of them into these rows; the others are padding."""
        fresh: Prefilled = self._call(
            programs.prefill_program, self._model, self._params, self._commit(put_batch(batch, self._mesh))
        )
        row = np.full(len(batch.tokens), self.shape.rows, np.int32)  # past the last: padding
        row[: len(rows)] = rows
        states, self._shared = self._call(programs.insert_program, self._cache.states, self._shared, fresh, row)
        self._cache = self._cache._replace(states=states)

    def resize(self, length: int) -> None:
        """Room for `length` tokens of each completion; what is cut off must be unused."""
        self._cache = self._call(programs.resize, self._cache, length)
        self.shape = self.shape._replace(length=length)

    def move(self, moves: Moves) -> None:
        """Fewer rows or completions: those that `moves` names, where it says."""
        self._cache, self._shared = self._call(programs.move, self._cache, self._shared, moves)
        rows, group = moves.column.shape
        self.shape = self.shape._replace(rows=rows, group=group)

    def block(self, slots: Slots) -> Drawn:
        """One more block of every completion, as NumPy arrays."""
        self._cache, drawn = self._call(programs.decode_program, *self._of_block(slots), **self._static)
        return jax.device_get(drawn)

    def lower_block(self, slots: Slots) -> jax.stages.Lowered:
        """The program of `block` in the present shape: once compiled, on whatever thread, `block` finds it there."""
        return self._call(programs.decode_program.lower, *self._of_block(slots), **self._static)

    def _of_block(self, slots: Slots) -> tuple[Any, ...]:
        rows = Rows(*(self._send(name, getattr(slots, name)) for name in Rows._fields))
        return self._model, self._params, self._cache, self._shared, rows, self._key

    def _send(self, name: str, value: np.ndarray) -> Any:
        """To the device, unless it is there: from block to block little of this changes but the step."""
        if name not in self._sent or not np.array_equal(self._sent[name][0], value):
            kept = value.copy()
            self._sent[name] = kept, self._commit(put_rows(kept, self._mesh))
        return self._sent[name][1]

    @property
    def _static(self) -> dict[str, Any]:
        return {"steps": self._steps, "sampling": self._sampling}

    def _commit(self, tree: Any) -> Any:
        """The arrays bound to their device: JAX compiles anew for arguments that may be anywhere and for those that
        may not, and what a program gives out is bound as soon as one argument is."""
        return tree if self._device is None else jax.device_put(tree, self._device)

    def _call(self, program: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return on_mesh(program, self._mesh)(*args, **options)
