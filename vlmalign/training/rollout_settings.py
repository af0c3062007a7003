"""What is sampled for an optimiser batch of GRPO or PPO, and what its completions are compared with; checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vlmalign.objectives.entropy import AdaptiveEntropy
from vlmalign.objectives.kl import ESTIMATORS
from vlmalign.objectives.names import require_known
from vlmalign.training.loop import Stage

ADVANTAGES = ("group", "leave_one_out", "token")


@dataclass(frozen=True)
class RolloutSettings:
    """One rollout of `prompts` prompts serves `updates` optimiser steps."""

    prompts: int  #: per optimiser batch
    updates: int = 1  #: optimiser steps on one rollout
    attempts: int = 1  #: rounds of dynamic sampling; 1: none
    overlong_buffer: int | None = None  #: tokens before the limit from which length costs reward; None: no penalty
    advantage: str = "group"  #: "group", "leave_one_out" (RLOO), or "token" (GAE with a value head: PPO)
    scale: str = "none"  #: of group advantages, as in `advantages.SCALES`
    ddof: int = 1  #: 1: Bessel's standard deviation, 0: the population's
    normalise_first: Mapping[str, float] | None = None  #: GDPO: normalise these rewards apart, with these weights
    kl_in_reward: float = 0.0  #: weight of the KL to the reference in the reward (needs a reference)
    kl: str = "k1"  #: estimator of that KL
    top_entropy: float = 1.0  #: share of tokens, by entropy, that carry the policy term; as in the objective
    mask_truncated: bool = False  #: completions cut at the limit are not among those tokens; as in the objective
    adaptive_entropy: AdaptiveEntropy | None = None  #: as in the objective, whose coefficient then follows the entropy
    gamma: float = 1.0  #: of GAE
    lam: float = 0.95  #: of GAE
    seed: int = 0

    def __post_init__(self) -> None:
        require_known("advantage", self.advantage, ADVANTAGES)
        require_known("KL estimator", self.kl, ESTIMATORS)
        for name in ("prompts", "updates", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, found {getattr(self, name)}")
        if not self.kl_in_reward >= 0:
            raise ValueError(
                f"kl_in_reward must be >= 0, found {self.kl_in_reward}; a negative one rewards leaving the reference"
            )
        if not 0 <= self.top_entropy <= 1:
            raise ValueError(f"top_entropy is a share of the tokens, in [0, 1]; found {self.top_entropy}")
        if self.advantage != "group" and (self.normalise_first is not None or self.scale != "none"):
            raise ValueError(f"scale and normalise_first belong to group advantages, found {self.advantage!r}")
        if self.advantage == "token" and (self.attempts > 1 or self.top_entropy < 1):
            raise ValueError(
                "attempts > 1 and top_entropy < 1 do not go with token advantages: a value head learns from groups of "
                "equal rewards too, and PPO's loss takes every token"
            )
        if self.normalise_first is not None:
            self._check_parts(self.normalise_first)

    def _check_parts(self, weights: Mapping[str, float]) -> None:
        if not weights or not all(math.isfinite(weight) for weight in weights.values()):
            raise ValueError(f"normalise_first needs a finite weight for each of its rewards, found {dict(weights)}")
        if self.kl_in_reward > 0 or self.scale != "none":
            raise ValueError(
                "normalise_first normalises each reward by itself and their sum over the batch: kl_in_reward and scale "
                "have no place in it; put the KL into the loss (beta)"
            )

    @property
    def scores_first(self) -> bool:
        """The policy that sampled scores its completions before the first update."""
        return self.updates > 1 or self.kl_in_reward > 0 or self.top_entropy < 1 or self.advantage == "token"

    def check_stage(self, stage: Stage) -> None:
        """Raises ValueError when the stage would be saved between the updates of one rollout, before it begins."""
        steps = {"steps": stage.steps, "checkpoint_every": stage.checkpoint_every}
        if stage.best is not None and stage.best.patience is not None:  # may end the stage, and saves it there
            steps["evaluate_every"] = stage.evaluate_every
        odd = [f"{name} {value}" for name, value in steps.items() if value % self.updates]
        if odd:
            raise ValueError(
                f"stage {stage.name}: a checkpoint between the {self.updates} updates of one rollout cannot be "
                f"continued; make {' and '.join(odd)} a multiple of {self.updates}"
            )
