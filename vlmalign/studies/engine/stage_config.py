"""The kinds of stage: a model and an adapter as they are found, and four ways of training that go on from another stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from vlmalign.config import FREE, Config
from vlmalign.models.attention import IMPLEMENTATIONS
from vlmalign.studies.engine.control_config import Control
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.objective_config import DpoObjective, GrpoObjective, PpoObjective
from vlmalign.studies.engine.reward_config import AnyReward, Scoring
from vlmalign.studies.engine.sections import Batch, Lora, NotNegative, Optimiser, Positive, Rollout, Share
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


class ModelStage(Config):
    """A checkpoint folder of any known family, and how it is run."""

    kind: Literal["model"] = "model"
    path: Annotated[Path, FREE]
    dtype: Literal["float32", "bfloat16"] = "float32"  #: of frozen parameters and activations; never float16
    attention: Annotated[Literal["auto", *IMPLEMENTATIONS], FREE] = "auto"
    #: what the backward pass makes again (`models.decoder.REMAT`); auto: chosen by the plan, as rows are
    remat: Annotated[Literal["none", "dots", "attention", "full", "auto"], FREE] = "none"
    lora: Lora | None = Lora()  #: what its stages train; null: the whole decoder (never the vision tower)


class AdapterStage(Config):
    """Anybody's PEFT folder on a model of the study."""

    kind: Literal["adapter"]
    from_: str = Field(alias="from")  #: a stage of kind model
    path: Annotated[Path, FREE]
    lora: Lora | None = None  #: what its settings must be; null: what the folder says


class Validation(Config):
    """Held-out rows, measured every so many updates and after the last one.

    Numbers are called "validation/NAME": for SFT loss (nat per token), for DPO loss, accuracy and margin, for GRPO and
    PPO reward (of greedy answers) with its standard error; with `answers`, those of the task as well (of label lists
    macro_f1, micro_f1, reasoning_named, reasoning_kept, valid, length). Those of a watched set are called "SET/NAME".
    """

    data: Data
    every: Positive  #: updates
    answers: bool = False  #: answer greedily and read the answers through the task; GRPO and PPO always do
    rows: Annotated[Positive | None, FREE] = None  #: prompts answered at once; null: the stage's
    completion: Positive | None = None  #: longest greedy answer, tokens; null: the rollouts'
    watch: tuple[str, ...] = ()  #: sets answered as well, only to be drawn as curves
    best: str | None = None  #: keep, and go on from, the state with the best such number; null: the last state
    patience: Positive | None = None  #: evaluations in a row without a better one before the stage ends

    @model_validator(mode="after")
    def _of_one_set(self) -> Validation:
        if len(self.data.sets) > 1:
            raise ValueError(f"data: expected one set, found {self.data.origin}; list the others in watch")
        return self

    @model_validator(mode="after")
    def _better_than_what(self) -> Validation:
        if self.patience is not None and self.best is None:
            raise ValueError("patience needs to know what is better: set best to the number that decides")
        return self


class Stage(Config):
    """What every stage that trains has."""

    #: the stage it goes on from: NAME (its best state, where it has one) or NAME@last; in a chain the one before
    from_: str | None = Field(None, alias="from")
    data: Data
    task: str | None = None  #: null: the study's only task; rows of turns need none
    seed: Annotated[int, Field(ge=0)] | None = None  #: null: the study's; `seeds` gives each sibling its own
    shapes: Annotated[Batch, FREE]
    optimiser: Optimiser
    checkpoint_every: Annotated[Positive, FREE] = 50  #: updates
    keep: Annotated[Literal["states", "all"], FREE] = "states"  #: of a finished stage; all: its checkpoints as well
    validation: Validation | None = None

    #: numbers that its validation measures without a task
    MEASURES: ClassVar[tuple[str, ...]] = ()

    @property
    def learns_from(self) -> dict[str, Data]:
        """Place in its section -> what is learnt from."""
        return {"data": self.data}

    @property
    def reads(self) -> dict[str, Data]:
        """Place in its section -> what is read: to learn from, and to be validated on."""
        held_out = {} if self.validation is None else {"validation.data": self.validation.data}
        return self.learns_from | held_out

    @model_validator(mode="after")
    def _a_number_that_is_measured(self) -> Stage:
        validation = self.validation
        if validation is None or validation.best in (None, *self.MEASURES):
            return self
        if not (validation.answers or isinstance(self, Policy)):
            wanted = " or ".join(repr(name) for name in self.MEASURES)
            raise ValueError(
                f"validation.best: expected {wanted}, found {validation.best!r}; numbers of answers need "
                "validation.answers: true"
            )
        return self


class Epochs(Stage):
    """A stage that goes over its data; its length in one of two units."""

    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: Positive | None = None  #: updates
    batch: Positive  #: examples, or pairs, per update

    @model_validator(mode="after")
    def _one_length(self) -> Epochs:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else "both"
            raise ValueError(f"give either epochs or steps, found {found}")
        if self.validation is not None and self.validation.answers and self.validation.completion is None:
            raise ValueError("validation.answers needs validation.completion: the longest answer, in tokens")
        return self

    def length(self, examples: int) -> int:
        """Updates on this many examples."""
        assert self.epochs is not None or self.steps is not None
        return self.steps if self.epochs is None else max(1, round(self.epochs * examples / self.batch))


class Sft(Epochs):
    """Supervised fine-tuning on {"messages": [...]}, where an assistant's turn may hold its loss "weight", or on the
    answers that the task writes."""

    kind: Literal["sft"]
    loss: Literal["nll", "dft"] = "nll"  #: see `objectives.sft`

    MEASURES: ClassVar[tuple[str, ...]] = ("loss",)


class Dpo(Epochs):
    """Preference optimisation on {"prompt", "chosen", "rejected"}; the state it goes on from is the reference."""

    kind: Literal["dpo"]
    reference: str | None = None  #: another stage of the same base as reference; null: the one it goes on from
    objective: DpoObjective = DpoObjective()

    MEASURES: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")


class Policy(Stage):
    """What GRPO and PPO share; the state they go on from is the reference of every KL."""

    reference: str | None = None  #: another stage of the same base as reference; null: the one it goes on from
    steps: Positive  #: updates
    prompts: Positive  #: per update
    updates: Positive = 1  #: optimiser steps on one rollout
    overlong_buffer: Positive | None = None  #: tokens before the limit from which length costs reward
    label_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: share of true labels that rewards are not shown
    rollout: Rollout
    rewards: Annotated[dict[str, AnyReward], Field(min_length=1)]
    scoring: Annotated[Scoring, FREE] = Scoring()
    kl_in_reward: NotNegative = 0.0  #: weight of the KL to the reference in the reward
    kl_estimator: str = "k1"  #: of that KL

    MEASURES: ClassVar[tuple[str, ...]] = ("reward",)

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
        for name in self.reward_names:
            if self.reward_names.count(name) > 1:
                raise ValueError(f"two rewards are called {name!r} (those of a set are called NAME_PART); rename one")
            if name in TAKEN or "/" in name or not name.strip():
                raise ValueError(
                    f"a reward cannot be called {name!r}: metrics have a number of that name, or could not tell it from "
                    f"their own; call it {'my_' if name.strip() else 'reward_'}{name.strip().replace('/', '_')}"
                )
        if not any(reward.weight for reward in self.rewards.values()):
            raise ValueError("every reward has weight 0: there is nothing to learn from")
        return self

    @property
    def reward_names(self) -> list[str]:
        """What the rewards are called in metrics and records: as in the config, and those of a set NAME_PART."""
        return [each for name, reward in self.rewards.items() for each in reward.names(name)]

    @property
    def reward_weights(self) -> dict[str, float]:
        """Reward -> its weight, by the names of `reward_names`; that of a set goes to all of its parts."""
        return {each: reward.weight for name, reward in self.rewards.items() for each in reward.names(name)}

    @property
    def needs_reference(self) -> bool:
        """Whether anything compares with a reference policy."""
        return self.objective.beta > 0 or self.kl_in_reward > 0


class SftBeside(Config):
    """The SFT loss of given answers, added to a policy's: L = L_policy + weight x L_sft, each over counts of its own."""

    data: Data
    batch: Positive  #: examples per update
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1


class Grpo(Policy):
    """Group-relative policy optimisation on prompts {"messages": [...], columns}, or on the questions of the task."""

    kind: Literal["grpo"]
    sft: SftBeside | None = None  #: an SFT loss beside it
    attempts: Positive = 1  #: rounds of dynamic sampling; 1: none
    advantage: Literal["group", "leave_one_out"] = "group"
    scale: Literal["none", "group", "batch"] = "none"  #: what group advantages are divided by the deviation of
    ddof: Literal[0, 1] = 1
    normalise_first: dict[str, float] | None = None  #: GDPO: normalise these rewards apart, with these weights
    control: Control | None = None  #: weights of rewards that follow what succeeds; null: they stand still
    objective: GrpoObjective = GrpoObjective()

    @property
    def learns_from(self) -> dict[str, Data]:
        return super().learns_from | ({} if self.sft is None else {"sft.data": self.sft.data})

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
            known = [*self.reward_names, *([] if self.overlong_buffer is None else [OVERLONG])]
            if unknown := sorted(set(self.normalise_first) - set(known)):
                raise ValueError(f"normalise_first names {unknown[0]!r}, but the rewards are {', '.join(known)}")
            if OVERLONG in known and OVERLONG not in self.normalise_first:
                raise ValueError(
                    f"overlong_buffer is set: give the penalty a weight in normalise_first, {OVERLONG}: 1.0"
                )
        self.rollout_settings(0)
        if self.control is not None:
            self.control.check(self.reward_weights)
        return self


class Ppo(Policy):
    """Proximal policy optimisation with a value head, on the same data as GRPO."""

    kind: Literal["ppo"]
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


AnyStage = Annotated[
    ModelStage | AdapterStage | Sft | Dpo | Grpo | Ppo,
    Field(discriminator="kind"),
]
Trains = Sft | Dpo | Grpo | Ppo
