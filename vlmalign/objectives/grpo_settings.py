"""Which loss of the GRPO family, with which bounds: a table of the losses by name, and the settings, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vlmalign.objectives.entropy import AdaptiveEntropy
from vlmalign.objectives.kl import ESTIMATORS
from vlmalign.objectives.names import require_known
from vlmalign.objectives.rollout_correction import RolloutCorrection


class LossKind(NamedTuple):
    surrogate: str
    divisor: str
    level: str


LOSSES = {
    "grpo": LossKind("clip", "sequence means", "token"),
    "gspo": LossKind("clip", "sequence means", "sequence"),
    "bnpo": LossKind("clip", "tokens", "token"),
    "dapo": LossKind("clip", "tokens", "token"),
    "dr_grpo": LossKind("clip", "longest", "token"),
    "luspo": LossKind("clip", "sequences", "sequence"),
    "cispo": LossKind("cispo", "tokens", "token"),
    "sapo": LossKind("sapo", "sequence means", "token"),
    "vespo": LossKind("vespo", "tokens", "token"),
    "gmpo": LossKind("gmpo", "sequence means", "token"),
}
LEVELS = ("token", "sequence")


@dataclass(frozen=True)
class GrpoSettings:
    """The loss of a policy update; the defaults are Dr. GRPO's with a symmetric clip and no penalty."""

    clip_low: float = 0.2  #: distance from 1 (gmpo: of the log ratio from 0; cispo, sapo and vespo do not use it)
    clip_high: float = 0.2  #: distance from 1 (gmpo: of the log ratio from 0; cispo: the cap of the ratio itself)
    beta: float = 0.0  #: weight of the KL penalty; 0 needs no reference pass
    max_completion: int = 768  #: tokens; dr_grpo divides by it
    loss: str = "dr_grpo"  #: a key of `LOSSES`
    level: str | None = None  #: ratio per "token" or "sequence"; None is the loss's own
    delta: float | None = None  #: bound on the ratio where A < 0 too; above 1 + clip_high
    kl: str = "k3"  #: a member of `kl.ESTIMATORS`
    kl_unbiased: bool = False  #: multiply the estimate by the differentiable ratio (TRL's default; see kl.py)
    mask_truncated: bool = False  #: leave completions cut at the length limit out of the loss (not of the advantages)
    off_policy_threshold: float | None = None  #: nat per token from rollout_logp, or else old_logp; drops A < 0 beyond
    top_entropy: float = 1.0  #: share of tokens that carry the policy term; below 1 needs GroupBatch.entropy_mask
    entropy_coef: float = 0.0  #: weight of the mean entropy, added as a bonus
    adaptive_entropy: AdaptiveEntropy | None = None  #: a coefficient that changes from step to step instead
    rollout: RolloutCorrection | None = None  #: importance ratios of trainer over rollout engine
    sapo_tau: tuple[float, float] = (1.0, 1.05)  #: A > 0, A <= 0
    vespo_positive: tuple[float, float] = (2.0, 3.0)  #: (k, lambda) where A >= 0
    vespo_negative: tuple[float, float] = (3.0, 2.0)  #: (k, lambda) where A < 0

    @property
    def kind(self) -> LossKind:
        found = LOSSES[self.loss]
        return found if self.level is None else found._replace(level=self.level)

    @property
    def entropy_bonus(self) -> bool:
        return self.entropy_coef > 0 or self.adaptive_entropy is not None

    def __post_init__(self) -> None:
        require_known("loss", self.loss, LOSSES)
        require_known("KL estimator", self.kl, ESTIMATORS)
        if self.level is not None:
            require_known("level of the ratio", self.level, LEVELS)
        self._check_bounds()
        if not self.beta >= 0:
            raise ValueError(f"beta must be >= 0, found {self.beta}; a negative one rewards leaving the reference")
        if self.max_completion < 1:
            raise ValueError(f"max_completion must be >= 1 token, found {self.max_completion}")
        if not 0 <= self.top_entropy <= 1:
            raise ValueError(f"top_entropy is a share of the tokens, in [0, 1]; found {self.top_entropy}")
        if not self.entropy_coef >= 0:
            raise ValueError(f"entropy_coef must be >= 0, found {self.entropy_coef}; a negative one removes entropy")
        if self.off_policy_threshold is not None and not self.off_policy_threshold > 0:
            raise ValueError(f"off_policy_threshold must be > 0 nat, found {self.off_policy_threshold}")
        if min(self.sapo_tau) <= 0:
            raise ValueError(f"sapo_tau must be > 0 for both signs of the advantage, found {self.sapo_tau}")
        for name, (k, rate) in (("positive", self.vespo_positive), ("negative", self.vespo_negative)):
            if k < 0 or rate < 1e-4:
                raise ValueError(f"vespo_{name} must be (k >= 0, lambda >= 1e-4), found {(k, rate)}")
        if self.loss == "gspo" and self.level == "token":
            raise ValueError("gspo is grpo with one ratio per sequence; for ratios per token set loss to grpo")
        if self.loss == "vespo" and self.kind.level == "sequence":
            raise ValueError("vespo weighs whole sequences itself and takes ratios per token; set level to token")
        if self.loss == "vespo" and self.rollout is not None and self.rollout.mode.startswith("sequence"):
            raise ValueError(
                f"vespo multiplies rollout ratios into its own sequence weight and takes them per token; "
                f"found mode {self.rollout.mode}, expected token_truncate or token_mask"
            )

    def _check_bounds(self) -> None:
        low, high, surrogate = self.clip_low, self.clip_high, LOSSES[self.loss].surrogate
        if surrogate == "clip" and not (0 <= low < 1 and high >= 0):
            raise ValueError(f"clip bounds must satisfy 0 <= clip_low < 1 and clip_high >= 0; found {low} and {high}")
        if surrogate == "gmpo" and (low < 0 or high < 0):
            raise ValueError(f"gmpo clips log ratios: clip_low and clip_high must be >= 0; found {low} and {high}")
        if surrogate == "cispo" and high <= 0:
            raise ValueError(f"cispo caps the ratio itself at clip_high, which must be > 0; found {high}")
        if self.delta is not None and surrogate != "clip":
            raise ValueError(f"delta bounds a clipped ratio, which {self.loss} has not; set it to null")
        if self.delta is not None and self.delta <= 0:
            raise ValueError(f"delta bounds the ratio and must be > 0 (above 1 + clip_high), found {self.delta}")
