"""Scores completions with several rewards at once: worker processes, async judges, rewards with memory, one record.

with RewardRunner({"labels": (LabelOverlap(LABELS), 1.0), "format": (FormatReward(), 0.0)}, workers=2) as runner:
    scored = runner.score(prompts, completions, {"truth": truth, "completion_ids": ids})
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from vlmalign.rewards.awaiting import AsyncReward
from vlmalign.rewards.contract import (
    Batch,
    Fault,
    MemoryReward,
    Reward,
    Row,
    Value,
    attempt,
    checked,
    is_async,
    required_columns,
)
from vlmalign.rewards.pool import WorkerPool, chunks


class RowFault(NamedTuple):
    """Which reward failed for which completion, and how."""

    reward: str
    row: int
    kind: str  #: one of `contract.FAULTS`
    reason: str


class ScoredBatch(NamedTuple):
    """The rewards of a batch with their breakdown, which is always kept."""

    rewards: list[float | None]  #: weighted sums; None takes no part in the advantage
    parts: dict[str, list[float | None]]  #: reward -> its number for every completion, before its weight
    faults: tuple[RowFault, ...]  #: by reward, then by row

    @property
    def counts(self) -> dict[str, int]:
        """Failures by reward and kind: {"judge/timeout": 2}."""
        return dict(Counter(f"{fault.reward}/{fault.kind}" for fault in self.faults))


class RewardRunner:
    """Rewards by name, each with its weight. Not to be called from two threads at once.

    Rewards that compute run on chunks in `workers` processes; async ones are awaited in this process, at the same
    time; rewards with memory (`MemoryReward`) run last, here, on all completions in the order given, which must be
    (prompt, sample) order. A chunk that hangs, kills its worker or raises is tried again one completion at a time;
    a completion that fails alone gets None and is counted, with the reason. With `workers=0` computing rewards run
    in this process too: nothing is pickled, but a reward that hangs hangs the run, and one that crashes ends it.

    The total is sum_k w_k r_k over the rewards that apply. It is None where none applies, and where a reward with a
    weight failed: the rest of the sum would be a reward for something else. A reward of weight 0 is logged only.

    What `score` gives depends neither on `workers` nor on `chunk`, as long as rewards judge each completion alone.

    Raises ValueError for unusable settings, for a reward that cannot be called as rewards are, and, with workers,
    for one that cannot be pickled.
    """

    def __init__(
        self,
        rewards: Mapping[str, tuple[Reward | MemoryReward, float]],
        *,
        workers: int = 1,
        chunk: int = 16,
        timeout_s: float = 30.0,
        strict: bool = False,  #: the first failure raises ValueError: for trying out a reward
        output: Path
        | None = None,  #: file for what rewards print in their workers, up to a MiB; None: stderr, up to 64 KiB
    ):
        if not rewards:
            raise ValueError("expected at least one reward, found none; name one in the config")
        for name, found, low in (("workers", workers, 0), ("chunk", chunk, 1)):
            if found < low:
                raise ValueError(f"{name} must be >= {low}, found {found}")
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"timeout_s must be a positive number of seconds, found {timeout_s}")
        for name, (_, weight) in rewards.items():
            if not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a finite number, found {weight}")
        self._weights = {name: float(weight) for name, (_, weight) in rewards.items()}
        self._chunk, self._strict = chunk, strict
        found = {name: reward for name, (reward, _) in rewards.items()}
        self._memory = {name: reward for name, reward in found.items() if isinstance(reward, MemoryReward)}
        self._states = {name: json.dumps(reward.init()) for name, reward in self._memory.items()}
        plain = {name: reward for name, reward in found.items() if name not in self._memory}
        self._needs = {name: required_columns(reward, name) for name, reward in plain.items()}
        self._here = {name: reward for name, reward in plain.items() if not is_async(reward)}
        self._async = {
            name: AsyncReward(name, reward, chunk=chunk, timeout_s=timeout_s)
            for name, reward in plain.items()
            if is_async(reward)
        }
        self._pool = None
        if workers and self._here:
            self._pool = WorkerPool(self._here, workers=workers, chunk=chunk, timeout_s=timeout_s, output=output)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._weights)

    @property
    def weighted(self) -> tuple[str, ...]:
        """The rewards that are learnt from; the others are logged only."""
        return tuple(name for name, weight in self._weights.items() if weight)

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]
    ) -> ScoredBatch:
        """Every reward on every completion. Where `completion_ids` are given, `completion_tokens` are their counts.

        Raises ValueError when columns differ in length or a reward lacks one, when a reward returns a list that
        cannot be matched with the completions, and in strict mode for the first completion that could not be scored.
        Whatever is raised, the memory is as before and the runner can be used again. What a reward with memory
        raises is passed on: to leave it out would make its memory depend on the failure.
        """
        batch = self._batch(prompts, completions, columns)
        if not len(batch):
            return ScoredBatch([], {name: [] for name in self._weights}, ())
        found: dict[str, list[Value]] = {}
        try:
            for reward in self._async.values():
                reward.start(batch)
            found |= self._pool.run(batch) if self._pool is not None else self._in_process(batch)
            for name, reward in self._async.items():
                found[name] = reward.finish()
        finally:
            for reward in self._async.values():
                reward.cancel()
        states = {}
        for name, reward in self._memory.items():
            found[name], states[name] = self._remember(name, reward, batch)
        scored = combine({name: found[name] for name in self._weights}, self._weights)
        if self._strict and scored.faults:
            fault = scored.faults[0]
            raise ValueError(f"reward {fault.reward!r}, completion {fault.row}: {fault.kind}: {fault.reason}")
        self._states |= states
        return scored

    def get_state(self) -> dict[str, Any]:
        """The state of every reward with memory, for the checkpoint."""
        return {name: json.loads(state) for name, state in self._states.items()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `get_state` gave. Raises ValueError when it is of other rewards."""
        if set(state) != set(self._memory):
            raise ValueError(
                f"the saved memory is of rewards {sorted(state)}, but those with memory are {sorted(self._memory)}; "
                "go back to the rewards of that run, or start a new one"
            )
        self._states = {name: json.dumps(value) for name, value in state.items()}

    def close(self) -> None:
        """End the worker processes and threads."""
        if self._pool is not None:
            self._pool.close()
        for reward in self._async.values():
            reward.close()

    def __enter__(self) -> RewardRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self.close()

    def _batch(self, prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> Batch:
        columns = dict(columns)
        if "completion_ids" in columns and "completion_tokens" not in columns:
            columns["completion_tokens"] = [len(ids) for ids in columns["completion_ids"]]
        lengths = {"prompts": len(prompts), "completions": len(completions)}
        lengths |= {name: len(column) for name, column in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"expected one entry per completion in every column, found {lengths}")
        for name, needs in self._needs.items():
            if missing := [column for column in needs if column not in columns]:
                raise ValueError(f"reward {name!r} needs the columns {missing}, found {sorted(columns)}; add them")
        return Batch(prompts, completions, columns)

    def _in_process(self, batch: Batch) -> dict[str, list[Value]]:
        values: dict[str, list[Value]] = {}
        for name, reward in self._here.items():
            values[name] = []
            for rows in chunks(len(batch), self._chunk):
                found = attempt(name, reward, batch.take(rows))
                if isinstance(found, Fault):
                    alone = [attempt(name, reward, batch.take(range(row, row + 1))) for row in rows]
                    found = [one if isinstance(one, Fault) else one[0] for one in alone]
                values[name] += found
        return values

    def _remember(self, name: str, reward: MemoryReward, batch: Batch) -> tuple[list[Value], str]:
        rows = [
            Row(prompt, completion, {column: batch.columns[column][i] for column in batch.columns})
            for i, (prompt, completion) in enumerate(zip(batch.prompts, batch.completions, strict=True))
        ]
        returned, state = reward.update(rows, json.loads(self._states[name]))
        try:
            saved = json.dumps(state, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the state of reward {name!r} must be plain JSON ({error}); return such a state"
            ) from error
        return checked(name, returned, len(batch)), saved


def combine(values: Mapping[str, Sequence[Value]], weights: Mapping[str, float]) -> ScoredBatch:
    """Weighted totals of what the rewards gave, with the breakdown (see `RewardRunner` for the rule)."""
    faults = tuple(
        RowFault(name, row, value.kind, value.reason)
        for name, column in values.items()
        for row, value in enumerate(column)
        if isinstance(value, Fault)
    )
    parts = {name: [None if isinstance(v, Fault) else v for v in column] for name, column in values.items()}
    unscored = {fault.row for fault in faults if weights[fault.reward]}
    totals: list[float | None] = []
    for row in range(len(next(iter(values.values()), ()))):
        terms = [weights[name] * parts[name][row] for name in parts if weights[name] and parts[name][row] is not None]
        totals.append(sum(terms) if terms and row not in unscored else None)
    return ScoredBatch(totals, parts, faults)
