"""The section `control` of a GRPO stage: weights of capabilities under feedback."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pydantic import Field

from vlmalign.config import Config
from vlmalign.control.weights import WeightController
from vlmalign.training.controlled_rewards import Capability


class Control(Config):
    """See `control.weights.WeightController`, whose settings and defaults the others are."""

    capabilities: dict[str, tuple[str, ...]] = Field(
        default_factory=dict
    )  #: name -> rewards; empty: one for each reward
    #: reward -> the values that count as failure and as success, from which its success rate is rescaled; others: 0 and 1
    ranges: dict[str, tuple[float, float]] = Field(default_factory=dict)
    kp: float = 1.0
    ki: float = 0.05
    kd: float = 0.0
    decay: float = 0.9
    low: float = 0.2
    high: float = 5.0
    form: str = "position"  #: position, or as printed in BalancedBio

    def grouped(self, weighted: Sequence[str]) -> dict[str, Capability]:
        """The capabilities of a stage whose rewards with a weight these are."""
        named = self.capabilities or {name: (name,) for name in weighted}
        return {
            name: Capability({reward: self.ranges.get(reward, (0.0, 1.0)) for reward in rewards})
            for name, rewards in named.items()
        }

    def controller(self, names: Iterable[str]) -> WeightController:
        """Raises ValueError for settings out of range."""
        return WeightController(tuple(names), self.kp, self.ki, self.kd, self.decay, self.low, self.high, self.form)

    def check(self, weights: Mapping[str, float]) -> None:
        """Raises ValueError for what does not fit the rewards of the stage (`weights`: name -> weight)."""
        weighted = [name for name, weight in weights.items() if weight]
        used = [reward for rewards in self.capabilities.values() for reward in rewards]
        for reward in used:
            if reward not in weights:
                raise ValueError(f"control.capabilities names {reward!r}, but the rewards are {', '.join(weights)}")
            if not weights[reward]:
                raise ValueError(
                    f"control.capabilities: reward {reward!r} has weight 0, which no controller moves; give it one"
                )
            if used.count(reward) > 1:
                raise ValueError(
                    f"control.capabilities: reward {reward!r} stands twice; a reward belongs to one capability"
                )
        for reward, (low, high) in self.ranges.items():
            if reward not in (used or weighted):
                raise ValueError(f"control.ranges names {reward!r}, which is in no capability")
            if not low < high:
                raise ValueError(f"control.ranges.{reward}: expected two numbers that ascend, found {low} and {high}")
        if empty := [name for name, rewards in self.capabilities.items() if not rewards]:
            raise ValueError(f"control.capabilities.{empty[0]}: no reward stands for it; name one, or leave it out")
        self.controller(self.capabilities or weighted)
