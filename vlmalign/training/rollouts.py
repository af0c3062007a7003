"""Sampling and scoring for one optimiser batch: prompts rolled out, rewarded, and drawn anew where nothing is learnt.

With more than one attempt, groups that teach nothing (their completions all got the same reward) make way for other
prompts (dynamic sampling: DAPO, arXiv 2503.14476, eq. 11); when the attempts are used up they fill the batch, whose
size never changes.

Several processes share the prompts of a round out; afterwards all of them hold all rollouts, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vlmalign.data.pipeline import Position, shuffled_batches
from vlmalign.objectives.dynamic_sampling import decide, soft_overlong_penalty
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.rollout.completions import Completion
from vlmalign.shapes import Bool
from vlmalign.training.shared_rollouts import Answer, share_out
from vlmalign.types import Group

#: the name under which the length penalty stands among a completion's rewards
OVERLONG = "overlong"


class Task(NamedTuple):
    """A prompt that waits for completions, and the columns its reward needs."""

    prompt: Group
    text: str  #: the prompt as the reward sees it
    columns: Mapping[str, Any]


#: (round, (prompt, sample) of every completion, prompts, completions, columns) -> rewards, in the same order. Rounds
#: count up over a whole stage; a round that is asked for again after a kill is given the same completions.
Score = Callable[[int, Sequence[tuple[int, int]], list[str], list[str], dict[str, list[Any]]], ScoredBatch]


class Rollout(NamedTuple):
    """One prompt with its completions and what they were given."""

    task: Task
    completions: list[Completion]
    texts: list[str]
    rewards: np.ndarray  #: [K] float64, NaN where a completion could not be scored
    parts: dict[str, np.ndarray]  #: reward -> [K] float64, before its weight


class Sampled(NamedTuple):
    """The rollouts of an optimiser batch, and what their making cost."""

    rollouts: list[Rollout]
    flat: Bool[np.ndarray, "groups"]  #: groups that teach nothing
    attempts: int
    drawn: int  #: groups sampled in all
    faults: int  #: completions for which some reward failed


class Prompts:
    """Tasks in shuffled passes, taken some at a time, with a place that a checkpoint can hold.

    Tasks taken together are of one pass, so that none is there twice. What is left at the end of a pass and is fewer
    than asked for is left out of that pass.
    """

    def __init__(self, tasks: Sequence[Task], *, most: int, seed: int):
        """`most`: tasks that are asked for at once."""
        if len(tasks) < most:
            raise ValueError(f"a batch of {most} prompts needs at least as many, found {len(tasks)}")
        self._tasks: Position = shuffled_batches(tasks, batch=1, seed=seed, ahead=most)
        self._size, self._taken = len(tasks), 0

    def take(self, count: int) -> list[Task]:
        """The next `count` tasks."""
        if self._taken + count > self._size:
            for _ in range(self._size - self._taken):
                next(self._tasks)
            self._taken = 0
        self._taken += count
        return [next(self._tasks)[0] for _ in range(count)]

    def get_state(self) -> dict[str, Any]:
        return {"tasks": self._tasks.get_state(), "taken": self._taken}

    def set_state(self, state: dict[str, Any]) -> None:
        self._tasks.set_state(state["tasks"])
        self._taken = state["taken"]


class Sampler:
    """Draws prompts, completions and rewards."""

    def __init__(
        self,
        *,
        generate: Callable[[Sequence[Group], int], list[list[Completion]]],
        decode: Callable[[np.ndarray], str],
        score: Score,
        flat: Callable[[Sequence[Rollout]], Bool[np.ndarray, "groups"]],
        wanted: int,
        attempts: int,
        longest: int,
        overlong_buffer: int | None,
    ):
        """`generate(prompts, round)` samples, each round with draws of its own that depend on the prompt's id and on
        no other prompt, since a process is given its share of them; `flat` tells groups that teach nothing.

        `longest` and `overlong_buffer` are tokens (None: no length penalty).
        """
        self._generate, self._decode, self._score, self._flat = generate, decode, score, flat
        self._wanted, self._attempts = wanted, attempts
        self._longest, self._buffer = longest, overlong_buffer

    def draw(self, step: int, prompts: Prompts) -> Sampled:
        """`wanted` rollouts for the optimiser step number `step`."""
        found: list[Rollout] = []
        faults, count = 0, self._wanted
        for attempt in range(1, self._attempts + 1):
            rows, failed = self._roll(step * self._attempts + attempt - 1, prompts.take(count))
            found += rows
            faults += failed
            flat = self._flat(found)
            decision = decide(flat, wanted=self._wanted, attempt=attempt, attempts=self._attempts)
            if decision.stop:
                kept = list(decision.keep)
                return Sampled([found[i] for i in kept], flat[kept], attempt, len(found), faults)
            count = len(decision.resample)
        raise AssertionError("the last attempt always stops")

    def _roll(self, number: int, tasks: list[Task]) -> tuple[list[Rollout], int]:
        _check(tasks)
        answers = share_out(tasks, lambda own: self._answer(own, number))
        flat = [answer.completion for row in answers for answer in row]
        size = len(answers[0])
        columns: dict[str, list[Any]] = {
            name: [task.columns[name] for task in tasks for _ in range(size)] for name in tasks[0].columns
        }
        columns["completion_ids"] = [c.tokens.tolist() for c in flat]
        columns["completion_tokens"] = [len(c.tokens) for c in flat]
        texts = [answer.text for row in answers for answer in row]
        keys = [(task.prompt.id, sample) for task in tasks for sample in range(size)]
        scored = self._score(number, keys, [task.text for task in tasks for _ in range(size)], texts, columns)
        rewards, parts = _numbers(scored.rewards), {name: _numbers(values) for name, values in scored.parts.items()}
        if self._buffer is not None:
            if OVERLONG in parts:
                raise ValueError(f"a reward is called {OVERLONG!r}, as the penalty on long completions is; rename it")
            lengths = np.array(columns["completion_tokens"])
            parts[OVERLONG] = soft_overlong_penalty(lengths, longest=self._longest, buffer=self._buffer)
            rewards = rewards + parts[OVERLONG]
        rows = []
        for i, task in enumerate(tasks):
            at = slice(i * size, (i + 1) * size)
            own = {name: values[at] for name, values in parts.items()}
            rows.append(Rollout(task, flat[at], texts[at], rewards[at], own))
        return rows, len({fault.row for fault in scored.faults})

    def _answer(self, tasks: Sequence[Task], number: int) -> list[list[Answer]]:
        rows = self._generate([task.prompt for task in tasks], number)
        return [[Answer(completion, self._decode(completion.tokens)) for completion in row] for row in rows]


def _check(tasks: Sequence[Task]) -> None:
    """Prompts are told apart by their ids, from which draws are derived, and have the same columns."""
    ids = [task.prompt.id for task in tasks]
    if len(set(ids)) < len(ids):
        double = next(number for number in ids if ids.count(number) > 1)
        raise ValueError(f"two prompts have the id {double} and would get the same completions; number them anew")
    for task in tasks:
        if differ := task.columns.keys() ^ tasks[0].columns.keys():
            raise ValueError(
                f"prompts {tasks[0].prompt.id} and {task.prompt.id} differ in the columns {sorted(differ)}; give every "
                "prompt the same ones (None where there is nothing)"
            )


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], np.float64)
