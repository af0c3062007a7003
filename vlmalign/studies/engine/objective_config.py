"""The losses of DPO, GRPO and PPO as sections of a config: the fields and defaults of the settings that they fill."""

from __future__ import annotations

from pydantic import model_validator

from vlmalign.config import Config
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.objectives.entropy import AdaptiveEntropy
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.objectives.ppo import PpoSettings
from vlmalign.objectives.rollout_correction import RolloutCorrection


class DpoObjective(Config):
    """See `objectives.dpo.DpoSettings`, whose fields and defaults these are."""

    losses: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float | None = None
    wpo: bool = False
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05

    def settings(self) -> DpoSettings:
        return DpoSettings(**self.model_dump())

    @model_validator(mode="after")
    def _in_range(self) -> DpoObjective:
        self.settings()
        return self


class Correction(Config):
    """See `objectives.rollout_correction.RolloutCorrection`, whose fields and defaults these are."""

    mode: str = "sequence_mask"
    low: float | None = None
    high: float | None = 3.0
    support: str = "full"


class Adaptive(Config):
    """See `objectives.entropy.AdaptiveEntropy`, whose fields and defaults these are."""

    initial: float = 0.0
    target: float = 0.2
    step: float = 0.005
    low: float = 0.0
    high: float = 1.0


class GrpoObjective(Config):
    """See `objectives.grpo_settings.GrpoSettings`, whose fields and defaults these are; the rest of it is set by the stage."""

    loss: str = "dr_grpo"
    level: str | None = None
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    kl_unbiased: bool = False
    mask_truncated: bool = False
    off_policy_threshold: float | None = None
    top_entropy: float = 1.0
    entropy_coef: float = 0.0
    adaptive_entropy: Adaptive | None = None
    correction: Correction | None = None  #: the field `rollout` there
    sapo_tau: tuple[float, float] = (1.0, 1.05)
    vespo_positive: tuple[float, float] = (2.0, 3.0)
    vespo_negative: tuple[float, float] = (3.0, 2.0)

    def settings(self, completion: int = 1) -> GrpoSettings:
        """For completions of at most this many tokens."""
        own = self.model_dump(exclude={"correction", "adaptive_entropy"})
        correction = None if self.correction is None else RolloutCorrection(**self.correction.model_dump())
        return GrpoSettings(**own, max_completion=completion, adaptive_entropy=self.adaptive(), rollout=correction)

    def adaptive(self) -> AdaptiveEntropy | None:
        return None if self.adaptive_entropy is None else AdaptiveEntropy(**self.adaptive_entropy.model_dump())

    @model_validator(mode="after")
    def _in_range(self) -> GrpoObjective:
        self.settings()
        return self


class PpoObjective(Config):
    """See `objectives.ppo.PpoSettings`, whose fields and defaults these are."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    beta: float = 0.0
    kl: str = "k3"
    entropy_coef: float = 0.0

    def settings(self) -> PpoSettings:
        return PpoSettings(**self.model_dump())

    @model_validator(mode="after")
    def _in_range(self) -> PpoObjective:
        self.settings()
        return self
