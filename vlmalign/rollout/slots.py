"""Which prompts stand in which rows while they are decoded, and what their completions have become. NumPy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlmalign.rollout.compaction import Moves
from vlmalign.rollout.stop_strings import first_stop
from vlmalign.shapes import Bool, Float, Int


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

    def __call__(self, tokens: Int[np.ndarray, "length"], known: int) -> tuple[int, bool] | None:
        """(length, stopped) of a completion that has ended; None: it goes on. Its first `known` tokens do not end it."""
        ids = np.flatnonzero(np.isin(tokens[known : self.longest], self.stop_ids))
        length, stopped = (known + int(ids[0]) + 1, True) if len(ids) else (min(len(tokens), self.longest), False)
        if self.stop:
            cut = first_stop(tokens[:length], self.stop, self.decode, known=known)
            if cut is not None:
                return cut, True
        return (length, stopped) if stopped or length == self.longest else None


class Slots:
    """`rows` rows of `group` completions. A row without a prompt computes what nobody reads."""

    def __init__(self, rows: int, group: int, ending: Ending):
        self._ending, self._group = ending, group
        self.number = np.full(rows, -1)  #: of the prompt in the run; -1: free
        self.prompt_length, self.next_position, self.group_id, self.step = (np.zeros(rows, np.int32) for _ in range(4))
        self.sample = np.tile(np.arange(group, dtype=np.int32), (rows, 1))
        self.live: Bool[np.ndarray, "n k"] = np.zeros((rows, group), bool)
        self._written: dict[int, list[list[np.ndarray]]] = {}
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
        empty = (np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.float32))
        self._written[number] = [list(empty) for _ in range(self._group)]
        self._done[number] = [None] * self._group

    def add(
        self, drawn: Sequence[Int[np.ndarray, "n k b"] | Float[np.ndarray, "n k b"]]
    ) -> dict[int, list[Completion]]:
        """Take in a block of (tokens, logp, kept_logp); the prompts whose completions have all ended, which leave."""
        for row, column in np.argwhere(self.live):
            number, sample = int(self.number[row]), int(self.sample[row, column])
            parts = self._written[number][sample]
            known = len(parts[0])
            parts[:] = (np.concatenate([old, new[row, column]]) for old, new in zip(parts, drawn, strict=True))
            end = self._ending(parts[0], known)
            if end is not None:
                self.live[row, column] = False
                self._done[number][sample] = Completion(*(part[: end[0]] for part in parts), stopped=end[1])
        self.step[self.number >= 0] += drawn[0].shape[2]
        left = {}
        for row in np.flatnonzero((self.number >= 0) & ~self.live.any(axis=1)):
            number = int(self.number[row])
            left[number] = self._done.pop(number)
            del self._written[number]
            # A free row starts over, so that what it writes stays within its cache.
            self.number[row], self.step[row], self.prompt_length[row] = -1, 0, 0
        return left

    def move(self, moves: Moves) -> None:
        """Follow the caches into a smaller shape."""
        row, column = moves
        for name in ("number", "prompt_length", "next_position", "group_id", "step"):
            setattr(self, name, getattr(self, name)[row])
        self.sample, self.live = self.sample[row[:, None], column], self.live[row[:, None], column]
