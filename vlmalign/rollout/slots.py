"""Which prompts stand in which rows while they are decoded, and what their completions have become. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmalign.rollout.compaction import Moves
from vlmalign.rollout.stop_strings import first_stop
from vlmalign.shapes import Bool, Float, Int

#: (the prompt's number in the run, the sample's number, the completion's tokens so far: [length] int32)
Watch = Callable[[int, int, np.ndarray], None]


@dataclass(frozen=True)
class Completion:
    """One sampled answer. What ended it, a stop token or a stop string, is part of it and counts."""

    tokens: np.ndarray  #: [length] int32
    logp: np.ndarray  #: [length] float32, over the whole vocabulary at the sampling temperature
    kept_logp: np.ndarray  #: [length] float32, the same within the tokens that top-k, top-p and min-p kept
    stopped: bool  #: False: cut off at the length limit


@dataclass(frozen=True)
class Ending:
    """What ends a completion."""

    longest: int  #: tokens
    stop_ids: tuple[int, ...]
    stop: tuple[str, ...] = ()
    decode: Callable[[np.ndarray], str] | None = None  #: tokens -> text, for `stop`

    def by_token(
        self, block: Int[np.ndarray, "n k b"], known: Int[np.ndarray, "n"]
    ) -> tuple[Int[np.ndarray, "n k"], Bool[np.ndarray, "n k"]]:
        """(length, stopped) of completions that had `known` tokens before this block, as stop tokens and the limit say."""
        place = known[:, None, None] + np.arange(block.shape[2])
        stops = np.isin(block, self.stop_ids) & (place < self.longest)
        stopped = stops.any(axis=2)
        end = np.minimum(known + block.shape[2], self.longest)[:, None]
        return np.where(stopped, known[:, None] + stops.argmax(axis=2) + 1, end), stopped


class Slots:
    """`rows` rows of `group` completions. A row without a prompt computes what nobody reads."""

    def __init__(self, rows: int, group: int, ending: Ending):
        self._ending, self._group = ending, group
        self.number = np.full(rows, -1)  #: of the prompt in the run; -1: free
        self.prompt_length, self.next_position, self.group_id, self.step = (np.zeros(rows, np.int32) for _ in range(4))
        self.sample = np.tile(np.arange(group, dtype=np.int32), (rows, 1))
        self.live: Bool[np.ndarray, "n k"] = np.zeros((rows, group), bool)
        # Tokens, logp and kept_logp so far: [n, k, room].
        self._written = [np.zeros((rows, group, ending.longest), dtype) for dtype in (np.int32, np.float32, np.float32)]
        self._done: dict[int, list[Completion | None]] = {}

    @property
    def free(self) -> Int[np.ndarray, "free"]:
        """Rows that can take a prompt."""
        return np.flatnonzero(self.number < 0)

    @property
    def longest(self) -> int:
        """Tokens of the longest live completion."""
        return int(self.step[self.number >= 0].max(initial=0))

    def put(self, row: int, number: int, *, group_id: int, length: int, next_position: int) -> None:
        """A prompt into a free row."""
        assert self.number[row] < 0
        self.number[row], self.group_id[row] = number, group_id
        self.prompt_length[row], self.next_position[row], self.step[row] = length, next_position, 0
        self.sample[row] = np.arange(self.sample.shape[1])
        self.live[row] = True
        self._done[number] = [None] * self._group

    def add(
        self, drawn: Sequence[Int[np.ndarray, "n k b"] | Float[np.ndarray, "n k b"]], watch: Watch | None = None
    ) -> dict[int, list[Completion]]:
        """Take in a block of (tokens, logp, kept_logp); the prompts whose completions have all ended, which leave.

        `watch` is told of every completion that the block went on with.
        """
        for row in np.flatnonzero(self.number >= 0):
            start = self.step[row]
            for written, new in zip(self._written, drawn, strict=True):
                room = written[row, :, start : start + new.shape[2]]
                room[:] = new[row, :, : room.shape[1]]
        ending = self._ending
        length, stopped = ending.by_token(drawn[0], self.step)
        if ending.stop:
            for place in map(tuple, np.argwhere(self.live)):
                tokens, known = self._written[0][place][: length[place]], int(self.step[place[0]])
                cut = first_stop(tokens, ending.stop, ending.decode, known=known)
                if cut is not None:
                    length[place], stopped[place] = cut, True
        if watch is not None:
            for place in map(tuple, np.argwhere(self.live)):
                tokens = self._written[0][place][: length[place]].copy()
                watch(int(self.number[place[0]]), int(self.sample[place]), tokens)
        ended = self.live & (stopped | (length == ending.longest))
        for place in map(tuple, np.argwhere(ended)):
            parts = (written[place][: length[place]].copy() for written in self._written)
            done = Completion(*parts, stopped=bool(stopped[place]))
            self._done[int(self.number[place[0]])][int(self.sample[place])] = done
        self.live &= ~ended
        self.step[self.number >= 0] += drawn[0].shape[2]
        left = {}
        for row in np.flatnonzero((self.number >= 0) & ~self.live.any(axis=1)):
            left[int(self.number[row])] = self._done.pop(int(self.number[row]))
            # A free row starts over, so that what it writes stays within its cache.
            self.number[row], self.step[row], self.prompt_length[row] = -1, 0, 0
        return left

    def move(self, moves: Moves) -> None:
        """Follow the caches into a smaller shape."""
        row, column = moves
        for name in ("number", "prompt_length", "next_position", "group_id", "step"):
            setattr(self, name, getattr(self, name)[row])
        self.sample, self.live = self.sample[row[:, None], column], self.live[row[:, None], column]
        self._written = [written[row[:, None], column] for written in self._written]
