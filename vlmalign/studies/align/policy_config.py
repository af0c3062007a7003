"""The two stages that learn from their own completions: GRPO and PPO."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlmalign.config import Config
from vlmalign.objectives.entropy import AdaptiveEntropy
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.objectives.ppo import PpoSettings
from vlmalign.objectives.rollout_correction import RolloutCorrection
from vlmalign.studies.align.data_config import Prompts
from vlmalign.studies.align.reward_config import AnyReward, Scoring
from vlmalign.studies.align.stage_config import Stage, needs_best
from vlmalign.studies.run_config import Positive, Share
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import OVERLONG

#: numbers of a policy stage's metrics; a reward of the same name would be written over by them, or they by it
TAKEN = (
    *("step", "update", "reward", "reward_std", "unscored", "reward_faults", "length", "stopped", "flat_groups"),
    *("attempts", "groups_drawn", OVERLONG, "objective", "grad_norm", "skipped", "learning_rate", "nonfinite"),
    *("clip_high", "clip_low", "clipped", "entropy", "kl", "kl_old", "ratio", "surrogate", "log_ratio_max", "return"),
    *("rollout_gap", "rollout_log_ratio", "rollout_ratio", "rollout_gap_max", "rollout_weight", "off_policy_kept"),
    *("kept_gap", "kept_log_ratio", "kept_ratio", "kept_gap_max", "vespo_weight", "value", "value_error"),
    *("value_clipped", "decoded_used", "prefill_used", "cache_moves"),
)

NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Rollout(Config):
    """How completions are sampled."""

    rows: Positive | Literal["auto"]  #: prompts at once
    group: Positive = 4  #: completions per prompt; GRPO needs at least 2 to compare
    completion: Positive  #: longest, tokens
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    tensor: Positive = 1  #: devices that share the weights out among them; 1: each has all of them


class PolicyValidation(Config):
    """Greedy answers to held-out prompts, scored by the same rewards: "validation/reward" with its standard error."""

    data: Prompts
    every: Positive  #: updates
    rows: Positive | None = None  #: prompts at once; None: those of the rollout
    best: Literal["reward"] | None = None  #: keep, and go on from, the state of the highest; None: the last state
    patience: Positive | None = None  #: evaluations in a row without a better one before the stage ends

    @model_validator(mode="after")
    def _better_than_what(self) -> PolicyValidation:
        return needs_best(self)


class Policy(Stage):
    """What GRPO and PPO share; their first policy is the reference of every KL."""

    data: Prompts
    steps: Positive  #: updates
    prompts: Positive  #: per update
    updates: Positive = 1  #: optimiser steps on one rollout
    overlong_buffer: Positive | None = None  #: tokens before the limit from which length costs reward
    rollout: Rollout
    rewards: Annotated[dict[str, AnyReward], Field(min_length=1)]
    scoring: Scoring = Scoring()
    kl_in_reward: NotNegative = 0.0  #: weight of the KL to the reference in the reward
    kl_estimator: str = "k1"  #: of that KL
    validation: PolicyValidation | None = None

    @model_validator(mode="after")
    def _between_rollouts(self) -> Policy:
        """A checkpoint between the updates of one rollout could not be continued."""
        every = {"steps": self.steps, "checkpoint_every": self.checkpoint_every}
        if self.validation is not None:
            every["validation.every"] = self.validation.every
        for name, found in every.items():
            if found % self.updates:
                raise ValueError(f"{name} must be a multiple of updates = {self.updates}, found {found}")
        if self.overlong_buffer is not None and self.overlong_buffer > self.rollout.completion:
            raise ValueError(
                f"overlong_buffer must be <= rollout.completion = {self.rollout.completion}, found {self.overlong_buffer}"
            )
        for name in self.rewards:
            if name in TAKEN or "/" in name or not name.strip():
                raise ValueError(
                    f"a reward cannot be called {name!r}: metrics have a number of that name, or could not tell it from "
                    f"their own; call it {'my_' if name.strip() else 'reward_'}{name.strip().replace('/', '_')}"
                )
        if not any(reward.weight for reward in self.rewards.values()):
            raise ValueError("every reward has weight 0: there is nothing to learn from")
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


class Grpo(Policy):
    """Group-relative policy optimisation on prompts {"messages": [...], columns}."""

    kind: Literal["grpo"] = "grpo"
    attempts: Positive = 1  #: rounds of dynamic sampling; 1: none
    advantage: Literal["group", "leave_one_out"] = "group"
    scale: Literal["none", "group", "batch"] = "none"  #: what group advantages are divided by the deviation of
    ddof: Literal[0, 1] = 1
    normalise_first: dict[str, float] | None = None  #: GDPO: normalise these rewards apart, with these weights
    objective: GrpoObjective = GrpoObjective()

    def rollout_settings(self, seed: int) -> RolloutSettings:
        return RolloutSettings(
            self.prompts,
            updates=self.updates,
            attempts=self.attempts,
            overlong_buffer=self.overlong_buffer,
            advantage=self.advantage,
            scale=self.scale,
            ddof=self.ddof,
            normalise_first=self.normalise_first,
            kl_in_reward=self.kl_in_reward,
            kl=self.kl_estimator,
            top_entropy=self.objective.top_entropy,
            mask_truncated=self.objective.mask_truncated,
            adaptive_entropy=self.objective.adaptive(),
            seed=seed,
        )

    @model_validator(mode="after")
    def _groups_compare(self) -> Grpo:
        if self.rollout.group < 2:
            raise ValueError(
                f"rollout.group must be >= 2 to compare completions of a prompt, found {self.rollout.group}"
            )
        if self.normalise_first is not None:
            known = [*self.rewards, *([] if self.overlong_buffer is None else [OVERLONG])]
            if unknown := sorted(set(self.normalise_first) - set(known)):
                raise ValueError(f"normalise_first names {unknown[0]!r}, but the rewards are {', '.join(known)}")
            if OVERLONG in known and OVERLONG not in self.normalise_first:
                raise ValueError(
                    f"overlong_buffer is set: give the penalty a weight in normalise_first, {OVERLONG}: 1.0"
                )
        self.rollout_settings(0)
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


class Ppo(Policy):
    """Proximal policy optimisation with a value head, on prompts {"messages": [...], columns}."""

    kind: Literal["ppo"] = "ppo"
    gamma: Share = 1.0
    lam: Share = 0.95  #: of generalised advantage estimation
    objective: PpoObjective = PpoObjective()

    def rollout_settings(self, seed: int) -> RolloutSettings:
        return RolloutSettings(
            self.prompts,
            updates=self.updates,
            overlong_buffer=self.overlong_buffer,
            advantage="token",
            kl_in_reward=self.kl_in_reward,
            kl=self.kl_estimator,
            gamma=self.gamma,
            lam=self.lam,
            seed=seed,
        )

    @model_validator(mode="after")
    def _estimates(self) -> Ppo:
        self.rollout_settings(0)
        return self
