"""Prompts in, completions out: prompts flow through a few rows, each leaving when its last completion has ended.

Rows are freed and filled again between blocks of decoding; caches grow with the longest completion. Every program has
one of a few shapes (`compaction.decode_shapes`), which `Generator.warm_up` compiles ahead of time.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice, permutations
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlmalign.mesh import ROWS, on_mesh, put_batch, put_rows
from vlmalign.models.attention import KeyValue
from vlmalign.models.model import Model, Params
from vlmalign.rollout import cache as programs
from vlmalign.rollout.compaction import DecodeShape, decode_shapes, fitting, length_classes, packed
from vlmalign.rollout.decode_weights import decode_weights
from vlmalign.rollout.engine import Cache, Drawn, Prefilled, Rows, block_length
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.slots import Completion, Ending, Slots
from vlmalign.rollout.statistics import RolloutStats
from vlmalign.shapes import Key
from vlmalign.types import Group, Layout, Segment

__all__ = ["Completion", "Generator"]

#: prompts whose images are encoded at once
AHEAD = 64


@dataclass(frozen=True)
class Generator:
    """How to sample: shapes, ends and distribution. `rows` prompts run at once, each with `group` completions."""

    model: Model  #: without adapter: rollouts run on base parameters, or on a merged copy
    features: FeatureStore | None
    stop_ids: tuple[int, ...]
    rows: int
    group: int
    completion: int  #: longest completion, tokens
    sampling: Sampling
    multiple: int = 32  #: prompts are padded to a multiple of this many tokens
    images: int = 1  #: images per prompt that a batch has room for
    mesh: Mesh | None = None  #: prompts are cut over it by rows; parameters must live on it
    stop: tuple[str, ...] = ()  #: texts that end a completion, which keeps the tokens up to the end of the first one
    decode: Callable[[np.ndarray], str] | None = None  #: tokens -> text, in which `stop` is looked for
    prompt_lengths: tuple[int, ...] = ()  #: padded lengths of prompts; none: multiples of `multiple`, as they come
    prefill_rows: int | None = None  #: prompts computed at once; None: a quarter of `rows`, all of them on a mesh
    smaller: int = 2  #: halvings of the decode batch that the last completions of a rollout may move into

    def __post_init__(self) -> None:
        if self.stop and self.decode is None:
            raise ValueError(f"stop strings {list(self.stop)} are looked for in text; give decode (tokens -> text)")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every completion at once; leave it out")
        if self.prefill_rows is not None and not 1 <= self.prefill_rows <= self.rows:
            raise ValueError(f"prefill_rows must lie in 1 .. rows ({self.rows}), found {self.prefill_rows}")

    @property
    def steps(self) -> int:
        """Tokens per block of decoding."""
        return block_length(self.completion)

    @cached_property
    def shapes(self) -> tuple[DecodeShape, ...]:
        """Every shape in which decoding runs, for each padded length of prompts."""
        shares = 1 if self.mesh is None else math.prod(self.mesh.shape[axis] for axis in ROWS)
        return decode_shapes(
            rows=self.rows, group=self.group, completion=self.completion, steps=self.steps, smaller=self.smaller,
            shares=shares,
        )  # fmt: skip

    @property
    def prefilled_at_once(self) -> int:
        """Rows of the prefill program."""
        if self.prefill_rows is not None:
            return self.prefill_rows
        return max(1, self.rows // 4) if self.mesh is None else self.rows

    def run(
        self,
        params: Params,
        prompts: Sequence[Group],
        key: Key[jax.Array, ""],
        *,
        advance: Callable[[int], None] = lambda done: None,
        report: Callable[[RolloutStats], None] = lambda stats: None,
    ) -> list[list[Completion]]:
        """`group` completions of every prompt, in order.

        `advance(n)` is called as n more prompts are done, `report` with the rollout's counts at its end.
        """
        found: list[list[Completion]] = [[] for _ in prompts]
        stats, weights = RolloutStats(), decode_weights(self.model, params)
        classes = length_classes(
            [len(g.prompt) for g in prompts], rows=self.rows, multiple=self.multiple, allowed=self.prompt_lengths
        )
        for length, numbers in classes:
            stream = _Stream(self, params, weights, key, length, stats)
            for done in stream.run([(number, prompts[number]) for number in numbers]):
                for number, completions in done.items():
                    found[number] = completions
                if done:
                    advance(len(done))
        report(stats)
        return found

    def warm_up(self, params: Params) -> int:
        """Compile every program that `run` may need, by running each once; the number of decode programs.

        Where images differ in size, prefilling also has a program per power of two of their soft tokens: those
        compile when they are first met.

        Raises:
            ValueError: without `prompt_lengths`: any length could come.
        """
        if not self.prompt_lengths:
            raise ValueError("warm_up needs to know the padded lengths of prompts; set prompt_lengths")
        weights = decode_weights(self.model, params)
        for length in self.prompt_lengths:
            _Stream(self, params, weights, jax.random.key(0), length, RolloutStats()).warm_up()
        return len(self.prompt_lengths) * len(self.shapes)


class _Stream:
    """Prompts of one padded length on their way through the rows."""

    def __init__(
        self, generator: Generator, params: Params, weights: Params, key: Key[jax.Array, ""], prompt: int,
        stats: RolloutStats,
    ):  # fmt: skip
        devices = next(iter(params.values())).sharding.device_set
        self._device = next(iter(devices)) if generator.mesh is None and len(devices) == 1 else None
        self._g, self._params, self._weights = generator, self._commit(params), self._commit(weights)
        self._key = self._commit(key)
        self._prompt, self._stats = prompt, stats
        self._ready = 0  #: waiting prompts whose images are encoded
        self._ending = Ending(generator.completion, generator.stop_ids, generator.stop, generator.decode)

    def run(self, prompts: Sequence[tuple[int, Group]]) -> Iterator[dict[int, list[Completion]]]:
        """Yields, block by block, the prompts that are done: number -> completions."""
        g, waiting = self._g, deque(prompts)
        self._open(g.shapes[0])
        while True:
            self._refill(waiting)
            if not self._slots.live.any():
                return
            self._fit(waiting=bool(waiting))
            drawn = jax.device_get(self._block())
            done = self._slots.add(drawn)
            self._stats.tokens += sum(len(c.tokens) for completions in done.values() for c in completions)
            self._stats.completions += sum(map(len, done.values()))
            yield done

    def warm_up(self) -> None:
        """Every program of this length once: prefill and insertion, every decode shape, every change of shape."""
        g = self._g
        empty = np.zeros(1, np.int32)
        dummy = Group(0, Segment(empty, empty - 1, empty.astype(np.float32)), (), ())
        whole = [shape for shape in g.shapes if shape[:2] == g.shapes[0][:2]]
        self._open(whole[0])
        self._refill(deque([(0, dummy)]))
        for one, other in permutations(whole, 2):
            self._open(one)
            self._cache = programs.resize(self._cache, other.length)
        for one, other in combinations(g.shapes[len(whole) - 1 :], 2):
            self._open(one)
            self._move(other)
        for shape in g.shapes:
            self._open(shape)
            jax.block_until_ready(self._block())

    def _open(self, shape: DecodeShape) -> None:
        self._shape = shape
        self._slots = Slots(shape.rows, shape.group, self._ending)
        # The old caches go before new ones come.
        self._cache: Cache | None = None
        self._shared: list[KeyValue] | None = None
        self._cache, self._shared = self._commit(
            self._call(programs.empty_program, self._g.model, shape=shape, prompt=self._prompt)
        )

    def _refill(self, waiting: deque[tuple[int, Group]]) -> None:
        """Prompts into free rows, as many at once as a prefill takes; fewer only when no more come or all rows rest."""
        size = self._g.prefilled_at_once
        while waiting:
            free = self._slots.free
            count = min(size, len(waiting))
            if len(free) < count and self._slots.live.any():
                return
            self._encode(waiting)
            part = [waiting.popleft() for _ in range(min(count, len(free)))]
            self._ready -= len(part)
            self._insert(part, free[: len(part)])

    def _encode(self, waiting: deque[tuple[int, Group]]) -> None:
        """Have the images of the next prompts encoded, many at once: the tower's batches are fuller than a prefill's."""
        if self._g.features is not None and self._ready < min(self._g.prefilled_at_once, len(waiting)):
            coming = list(islice(waiting, AHEAD))
            self._g.features.features([key for _, group in coming for key in group.images])
            self._ready = len(coming)

    def _insert(self, part: list[tuple[int, Group]], rows: np.ndarray) -> None:
        g, size = self._g, self._g.prefilled_at_once
        batch = assemble(
            [group for _, group in part], Layout(self._prompt, 0, 0), rows=size, images=size * g.images,
            features=g.features,
        )  # fmt: skip
        fresh: Prefilled = self._call(
            programs.prefill_program, g.model, self._params, self._commit(put_batch(batch, g.mesh))
        )
        row = np.full(size, self._shape.rows, np.int32)  # past the last: padding
        row[: len(rows)] = rows
        states, self._shared = self._call(programs.insert_program, self._cache.states, self._shared, fresh, row)
        self._cache = self._cache._replace(states=states)
        for i, (number, group) in enumerate(part):
            # As `engine.after_prompt`, without waiting for the device.
            position = int(batch.position[i, : len(group.prompt)].max()) + 1
            self._slots.put(int(rows[i]), number, group_id=group.id, length=len(group.prompt), next_position=position)
            self._stats.prompt_tokens += len(group.prompt)
        self._stats.prompts += len(part)
        self._stats.prompt_columns += size * self._prompt

    def _fit(self, *, waiting: bool) -> None:
        """Bring the caches into the smallest shape that holds what the next block needs."""
        g, slots = self._g, self._slots
        live = slots.live
        rows, group = (g.rows, g.group) if waiting else (live.any(axis=1).sum(), live.sum(axis=1).max())
        shapes = [s for s in g.shapes if s.rows <= self._shape.rows and s.group <= self._shape.group]
        shape = fitting(shapes, rows=int(rows), group=int(group), length=slots.longest + g.steps)
        if shape == self._shape:
            return
        self._stats.moves += 1
        self._cache = programs.resize(self._cache, shape.length)
        if shape[:2] != self._shape[:2]:
            self._move(shape)
        self._shape = shape

    def _move(self, shape: DecodeShape) -> None:
        moves = packed(self._slots.live, rows=shape.rows, group=shape.group)
        self._cache, self._shared = self._call(programs.move, self._cache, self._shared, moves)
        self._slots.move(moves)

    def _block(self) -> Drawn:
        g, slots = self._g, self._slots
        rows = Rows(slots.prompt_length, slots.next_position, slots.group_id, slots.sample, slots.step)
        rows = self._commit(put_rows(rows, g.mesh))
        self._cache, drawn = self._call(
            programs.decode_program, g.model, self._weights, self._cache, self._shared, rows, self._key,
            steps=g.steps, sampling=g.sampling,
        )  # fmt: skip
        self._stats.blocks += 1
        self._stats.decoded += slots.live.size * g.steps
        return drawn

    def _commit(self, tree: Any) -> Any:
        """The arrays bound to their device: JAX compiles anew for arguments that may be anywhere and for those that
        may not, and what a program gives out is bound as soon as one argument is."""
        return tree if self._device is None else jax.device_put(tree, self._device)

    def _call(self, program: Callable[..., Any], *args: Any, **options: Any) -> Any:
        return on_mesh(program, self._g.mesh)(*args, **options)
