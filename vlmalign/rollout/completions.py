"""Prompts in, completions out: prompts flow through a few rows, each leaving when its last completion has ended.

Rows are freed and filled again between blocks of decoding; caches grow with the longest completion. Every program has
one of a few shapes (`compaction.decode_shapes`), which `Generator.warm_up` compiles ahead of time.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, islice, permutations

import jax
import numpy as np
from jax.sharding import Mesh

from vlmalign.data.groups import round_up
from vlmalign.mesh import require_rows, row_shares
from vlmalign.models.model import Model, Params
from vlmalign.rollout.compaction import MOST_PROGRAMS, DecodeShape, decode_shapes, fitting, length_classes, packed
from vlmalign.rollout.device_rows import DeviceRows
from vlmalign.rollout.engine import block_length
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.slots import Completion, Ending, Slots, Watch
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
    prefill_rows: int | None = None  #: prompts computed at once; None: about a quarter of `rows`
    smaller: int = 2  #: halvings of the decode batch that the last completions of a rollout may move into
    programs: int = MOST_PROGRAMS  #: decode programs at most; with 1, caches have their full length from the start

    def __post_init__(self) -> None:
        if self.stop and self.decode is None:
            raise ValueError(f"stop strings {list(self.stop)} are looked for in text; give decode (tokens -> text)")
        if "" in self.stop:
            raise ValueError("an empty stop string would end every completion at once; leave it out")
        if self.prefill_rows is not None and not 1 <= self.prefill_rows <= self.rows:
            raise ValueError(f"prefill_rows must lie in 1 .. rows ({self.rows}), found {self.prefill_rows}")
        if len(self.prompt_lengths) > self.programs:
            raise ValueError(
                f"prompt_lengths: at most {self.programs}, each of which has programs of its own; found "
                f"{len(self.prompt_lengths)}"
            )
        require_rows(self.rows, self.mesh, "the rows of the rollout")

    @property
    def steps(self) -> int:
        """Tokens per block of decoding."""
        return block_length(self.completion)

    @cached_property
    def shapes(self) -> tuple[DecodeShape, ...]:
        """Every shape in which decoding runs, for each padded length of prompts: `programs` at most over all
        `prompt_lengths`."""
        most = self.programs // max(1, len(self.prompt_lengths))
        return decode_shapes(
            rows=self.rows, group=self.group, completion=self.completion, steps=self.steps,
            smaller=min(self.smaller, most // 4) if most < MOST_PROGRAMS else self.smaller,
            shares=row_shares(self.mesh), most=most,
        )  # fmt: skip

    @property
    def prefilled_at_once(self) -> int:
        """Rows of the prefill program."""
        if self.prefill_rows is not None:
            return self.prefill_rows
        return round_up(self.rows // 4, row_shares(self.mesh))

    def run(
        self,
        params: Params,
        prompts: Sequence[Group],
        key: Key[jax.Array, ""],
        *,
        advance: Callable[[int], None] = lambda done: None,
        report: Callable[[RolloutStats], None] = lambda stats: None,
        watch: Watch | None = None,
    ) -> list[list[Completion]]:
        """`group` completions of every prompt, in order.

        `advance(n)` is called as n more prompts are done, `report` with the rollout's counts at its end. `watch` is
        called after every block of decoding with each completion that it went on with: streaming.
        """
        found: list[list[Completion]] = [[] for _ in prompts]
        stats = RolloutStats()
        classes = length_classes(
            [len(g.prompt) for g in prompts], rows=self.rows, multiple=self.multiple, allowed=self.prompt_lengths
        )
        if self.features is not None:
            self.features.expect([key for _, numbers in classes for n in numbers for key in prompts[n].images])
        for length, numbers in classes:
            stream = _Stream(self, self._open(params, key, length), length, stats, watch)
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
        for length in self.prompt_lengths:
            device = self._open(params, jax.random.key(0), length)
            _Stream(self, device, length, RolloutStats()).warm_up()
        return len(self.prompt_lengths) * len(self.shapes)

    def _open(self, params: Params, key: Key[jax.Array, ""], prompt: int) -> DeviceRows:
        return DeviceRows(
            self.model, params, key,
            prompt=prompt, steps=self.steps, sampling=self.sampling, mesh=self.mesh,
        )  # fmt: skip


class _Stream:
    """Prompts of one padded length on their way through the rows."""

    def __init__(
        self, generator: Generator, device: DeviceRows, prompt: int, stats: RolloutStats, watch: Watch | None = None
    ):
        self._g, self._device, self._prompt, self._stats, self._watch = generator, device, prompt, stats, watch
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
            drawn = self._device.block(self._slots)
            self._stats.blocks += 1
            self._stats.decoded += self._slots.live.size * g.steps
            done = self._slots.add(drawn, self._watch)
            self._stats.tokens += sum(len(c.tokens) for completions in done.values() for c in completions)
            self._stats.completions += sum(map(len, done.values()))
            yield done

    def warm_up(self) -> None:
        """Every program of this length once: prefill and insertion, every decode shape, every change of shape."""
        g = self._g
        empty = np.zeros(1, np.int32)
        dummy = Group(0, Segment(empty, empty - 1, empty.astype(np.float32)), (), ())
        whole = [shape for shape in g.shapes if shape[:2] == g.shapes[0][:2]]
        # Decode programs take the longest by far: they compile side by side, and beside all that follows.
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            decoding = [pool.submit(lowered.compile) for lowered in map(self._lower, g.shapes)]
            self._warm_up_moves(dummy, whole)
            for program in decoding:
                program.result()
        for shape in g.shapes:
            self._open(shape)
            self._device.block(self._slots)

    def _lower(self, shape: DecodeShape) -> jax.stages.Lowered:
        self._open(shape)
        return self._device.lower_block(self._slots)

    def _warm_up_moves(self, dummy: Group, whole: Sequence[DecodeShape]) -> None:
        """What brings prompts into rows, and caches from one shape into another; `whole` are the shapes of all rows."""
        g = self._g
        self._open(whole[0])
        self._refill(deque([(0, dummy)]))
        for one, other in permutations(whole, 2):
            self._open(one)
            self._device.resize(other.length)
        for one, other in combinations(g.shapes[len(whole) - 1 :], 2):
            self._open(one)
            self._device.move(packed(self._slots.live, rows=other.rows, group=other.group))

    def _open(self, shape: DecodeShape) -> None:
        self._slots = Slots(shape.rows, shape.group, self._ending)
        self._device.open(shape)

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
        self._device.insert(batch, rows)
        for i, (number, group) in enumerate(part):
            # As `engine.after_prompt`, without waiting for the device.
            position = int(batch.position[i, : len(group.prompt)].max()) + 1
            self._slots.put(int(rows[i]), number, group_id=group.id, length=len(group.prompt), next_position=position)
            self._stats.prompt_tokens += len(group.prompt)
        self._stats.prompts += len(part)
        self._stats.prompt_columns += size * self._prompt

    def _fit(self, *, waiting: bool) -> None:
        """Bring the caches into the smallest shape that holds what the next block needs."""
        g, slots, now = self._g, self._slots, self._device.shape
        live = slots.live
        rows, group = (g.rows, g.group) if waiting else (live.any(axis=1).sum(), live.sum(axis=1).max())
        shapes = [s for s in g.shapes if s.rows <= now.rows and s.group <= now.group]
        shape = fitting(shapes, rows=int(rows), group=int(group), length=slots.longest + g.steps)
        if shape == now:
            return
        self._stats.moves += 1
        self._device.resize(shape.length)
        if shape[:2] != now[:2]:
            moves = packed(live, rows=shape.rows, group=shape.group)
            self._device.move(moves)
            slots.move(moves)
