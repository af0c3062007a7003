"""Rewards whose weights follow a controller: once per rollout, by what the capabilities succeeded at so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlmalign.control.weights import State, WeightController
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.training.policy import Memory


@dataclass(frozen=True)
class Capability:
    """Rewards that stand for one ability, and between what values each lies."""

    ranges: Mapping[str, tuple[float, float]]  #: reward -> what counts as failure and as success

    def scaled(self, parts: Mapping[str, Sequence[float | None]]) -> np.ndarray:
        """[completions] the mean of its rewards that apply, each rescaled to [0, 1]; NaN where none does."""
        columns = [
            (np.array([np.nan if value is None else value for value in parts[name]], float) - low) / (high - low)
            for name, (low, high) in self.ranges.items()
        ]
        known = ~np.isnan(columns)
        return np.where(known.any(axis=0), np.nansum(columns, axis=0) / np.maximum(known.sum(axis=0), 1), np.nan)


@runtime_checkable
class Recorded(Memory, Protocol):
    """Rewards that survive the stage, as `recorded_rewards.RecordedRewards`."""

    def __call__(
        self,
        number: int,
        keys: Sequence[tuple[int, int]],
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list[Any]],
    ) -> ScoredBatch: ...


class ControlledRewards:
    """`score`, `memory` and `control` of a `PolicySource`.

    A completion's total is sum_k m_k w_k r_k: w_k is the weight in the config and m_k that of the controller for the
    capability of reward k (1 for a reward of none). All rounds of an optimiser batch are weighted alike; what they gave moves
    the weights of the next one.
    """

    def __init__(
        self,
        inner: Recorded,
        controller: WeightController,
        capabilities: Mapping[str, Capability],
        weights: Mapping[str, float],
        *,
        attempts: int,
    ):
        """`weights` are those of the config; `attempts`: rounds of one optimiser batch."""
        self._inner, self._controller, self._capabilities = inner, controller, capabilities
        self._weights, self._attempts = weights, attempts
        self._state: State = controller.init()
        self._step = 0  #: the optimiser batch that is being scored
        self._sums = self._nothing()

    def __call__(
        self,
        number: int,
        keys: Sequence[tuple[int, int]],
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list[Any]],
    ) -> ScoredBatch:
        """The rewards of round `number`; raises as `inner`, and ValueError for a reward outside its range."""
        step = number // self._attempts
        if step != self._step:
            self._state = self._controller.update(self._means(), self._state)
            self._step, self._sums = step, self._nothing()
        scored = self._inner(number, keys, prompts, completions, columns)
        for name, capability in self._capabilities.items():
            scaled = capability.scaled(scored.parts)
            known = scaled[~np.isnan(scaled)]
            self._sums[name] = [self._sums[name][0] + float(known.sum()), self._sums[name][1] + len(known)]
        return scored._replace(rewards=self._totals(scored))

    def multipliers(self) -> dict[str, float]:
        """Reward -> the controller's weight in use."""
        own = self._state["weights"]
        return {reward: own[name] for name, capability in self._capabilities.items() for reward in capability.ranges}

    def numbers(self) -> dict[str, float | None]:
        """For the metrics: of each capability its weight in use, its success rate before this batch, and this batch's mean
        reward, rescaled, and weighted."""
        found: dict[str, float | None] = {}
        for name, mean in self._means().items():
            weight = self._state["weights"][name]
            found |= {
                f"control/{name}": weight,
                f"success/{name}": self._state["success"][name],
                f"scaled/{name}": mean,
                f"weighted/{name}": None if mean is None else weight * mean,
            }
        return found

    def notes(self) -> list[str]:
        return self._controller.notes(self._state)

    def get_state(self) -> dict[str, Any]:
        """JSON."""
        return {"rewards": self._inner.get_state(), "control": self._state, "step": self._step, "sums": self._sums}

    def set_state(self, state: dict[str, Any]) -> None:
        self._inner.set_state(state["rewards"])
        self._state, self._step, self._sums = state["control"], state["step"], dict(state["sums"])

    def _nothing(self) -> dict[str, list[float]]:
        return {name: [0.0, 0] for name in self._capabilities}

    def _means(self) -> dict[str, float | None]:
        return {name: total / count if count else None for name, (total, count) in self._sums.items()}

    def _totals(self, scored: ScoredBatch) -> list[float | None]:
        """None where the runner gave none: a reward with a weight failed, or none applies."""
        multiplier = self.multipliers()
        weighted = {name: weight * multiplier.get(name, 1.0) for name, weight in self._weights.items() if weight}
        rows = range(len(scored.rewards))
        terms = [
            [
                weight * scored.parts[name][row]
                for name, weight in weighted.items()
                if scored.parts[name][row] is not None
            ]
            for row in rows
        ]
        return [None if scored.rewards[row] is None else sum(terms[row]) for row in rows]
