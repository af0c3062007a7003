"""Settings of the ChexReason pipeline. Values the paper does not print are ours, and the YAML files say so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlmalign.config import Config
from vlmalign.data.sources.schema import LABEL_MAPS
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD
from vlmalign.models.model import DTYPES
from vlmalign.studies.run_config import Mesh, Positive, Reading, Share


class Phantom(Config):
    """Write an invented data set of this format at `root` first, if nothing is there."""

    films: Positive | dict[str, int]  #: in all, or per split
    seed: int = 0
    size: Positive = 128  #: pixels per side
    workers: Positive = 1


class Films(Config):
    """A data set on disk. In `root`, "{run}" stands for the run folder."""

    name: str
    format: str
    root: str
    options: dict[str, Any] = Field(default_factory=dict)  #: of the format's reader: split, views, on_bad ...
    label_map: str | None = None  #: read the labels through this map; None keeps the data set's own
    phantom: Phantom | None = None

    @model_validator(mode="after")
    def _known_map(self) -> Films:
        if self.label_map is not None and self.label_map not in LABEL_MAPS:
            raise ValueError(f"label_map must be one of {', '.join(LABEL_MAPS)}, found {self.label_map!r}")
        return self


class Sample(Config):
    """Films drawn from the training source; sets share no film and no patient."""

    sft: Positive
    rl: Positive
    validation: Annotated[int, Field(ge=0)] = 0  #: drawn at random from what is left
    test: Annotated[int, Field(ge=0)] = 0  #: whole patients held out before anything is drawn
    floor: Share = 0.05  #: every label's least share of the SFT and RL sets
    films_per_patient: Positive | None = None


class Data(Config):
    """The training source, what is drawn from it, and its reasoning traces."""

    train: Films
    sample: Sample
    traces: str | None = None  #: JSONL {"id", "trace"}; "{run}" as in roots; None: reasoning that names the labels
    on_bad: Literal["error", "skip"] = (
        "error"  #: a film that cannot be decoded stops the run, or is left out and listed
    )
    reading: Reading = Reading()


class Lora(Config):
    """Adapter on the language model's projections."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: tuple[str, ...] = ATTENTION_AND_FEED_FORWARD
    rank_stabilised: bool = False  #: rsLoRA
    magnitude: bool = False  #: DoRA
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: of the adapter's inputs, in SFT only


class Model(Config):
    """A checkpoint folder and how it is run."""

    path: Path
    dtype: str = "float32"  #: float32 or bfloat16
    attention: str = "auto"
    #: what the backward pass makes again (`models.decoder.REMAT`); auto: chosen by the plan, as rows are
    remat: Literal["none", "dots", "attention", "full", "auto"] = "none"
    lora: Lora = Lora()

    @field_validator("dtype")
    @classmethod
    def _a_dtype_that_holds_the_activations(cls, dtype: str) -> str:
        if dtype not in DTYPES:
            raise ValueError(
                f"dtype must be {' or '.join(DTYPES)}, found {dtype!r}: activations of these models overflow float16"
            )
        return dtype


class Optimiser(Config):
    """See `training.optimiser`."""

    name: Literal["adamw", "lion", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Share = 0.9
    beta2: Share = 0.999
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class Batch(Config):
    """How groups become arrays: rows per micro-batch and the token multiples that lengths are rounded up to."""

    rows: Positive | Literal["auto"]
    tokens: Positive | None = None  #: budget of a micro-batch: long rows are fewer
    prompt_multiple: Positive = 32
    completion_multiple: Positive = 64


class EvaluationSet(Config):
    """A data set to be scored on; at most `limit` films, drawn by patient."""

    films: Films
    role: Literal["in-schema", "cross-schema"]
    limit: Positive | None = None


class Validation(Config):
    """What is measured while a stage trains, on the validation films of the sample and on other sets.

    Keep test sets out of it: a number that chooses the best state is no longer a test.
    """

    every: Annotated[int, Field(ge=0)] = 0  #: updates; 0: never
    loss: bool = True  #: mean negative log-likelihood of the validation films' answers: "validation/loss"
    answers: bool = False  #: greedy answers, macro-F1: "validation/macro_f1"
    sets: tuple[EvaluationSet, ...] = ()  #: greedy answers on these as well: "<name>/macro_f1"
    best: str | None = None  #: the number whose best state is kept and returned
    mode: Literal["min", "max"] = "min"
    patience: Positive | None = None  #: evaluations in a row without a better one before the stage ends

    @model_validator(mode="after")
    def _measures_something(self) -> Validation:
        if (self.best is not None or self.patience is not None) and not self.every:
            raise ValueError("best and patience need validation: set every to a number of updates")
        if self.patience is not None and self.best is None:
            raise ValueError('patience needs to know what is better: set best, such as "validation/loss"')
        if self.every and not (self.loss or self.answers or self.sets):
            raise ValueError("validation measures nothing: set loss, answers or sets")
        return self


class Sft(Config):
    """Supervised fine-tuning."""

    epochs: Annotated[float, Field(gt=0)]
    batch: Positive  #: examples per update
    shapes: Batch
    optimiser: Optimiser
    checkpoint_every: Positive = 50  #: updates
    validation: Validation = Validation()


class Reward(Config):
    """The hard reward; see `rewards.hard`."""

    min_tokens: Annotated[int, Field(ge=0)] = 250
    lambda_len: Share = 0.2


class Rollout(Config):
    """How completions are sampled while training."""

    rows: Positive | Literal["auto"]  #: prompts at once
    group: Annotated[int, Field(ge=2)] = 4  #: completions per prompt
    completion: Positive = 768  #: longest, tokens
    temperature: Annotated[float, Field(gt=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    tensor: Positive = 1  #: devices that share the weights out among them, in evaluation too; 1: each has all of them


class Grpo(Config):
    """Group-relative policy optimisation from the SFT adapter, which is also the reference."""

    steps: Positive
    prompts: Positive  #: per update
    updates: Positive = 1  #: optimiser steps on one rollout
    attempts: Positive = 1  #: rounds of dynamic sampling; 1: none
    overlong_buffer: Positive | None = None  #: tokens before the limit from which length costs reward
    rollout: Rollout
    reward: Reward = Reward()
    shapes: Batch
    optimiser: Optimiser
    loss: str = "dr_grpo"  #: a key of `objectives.grpo_settings.LOSSES`
    kl: str = "k3"  #: estimator of the penalty
    beta: Annotated[float, Field(ge=0)] = 0.15
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.15
    clip_high: Annotated[float, Field(ge=0)] = 0.22
    delta: Annotated[float, Field(gt=0)] | None = None  #: bound on the ratio where the advantage is negative
    mask_truncated: bool = False  #: leave completions cut at the length limit out of the loss
    top_entropy: Share = 1.0  #: share of tokens, by entropy, that carry the policy term
    scale: Literal["none", "group", "batch"] = "none"
    checkpoint_every: Positive = 20
    validation: Validation = Validation(loss=False)

    @model_validator(mode="after")
    def _saved_between_rollouts(self) -> Grpo:
        for name, found in (("checkpoint_every", self.checkpoint_every), ("validation.every", self.validation.every)):
            if found % self.updates:
                raise ValueError(f"{name} must be a multiple of updates = {self.updates}, found {found}")
        if self.steps % self.updates:
            raise ValueError(f"steps must be a multiple of updates = {self.updates}, found {self.steps}")
        if self.validation.loss and self.validation.every:
            raise ValueError("GRPO has no loss to validate; set validation.loss to false and answers to true")
        return self


class Evaluation(Config):
    """Greedy answers of base, SFT and GRPO on every set, with patient-bootstrap intervals."""

    sets: tuple[EvaluationSet, ...] = ()
    rows: Positive = 32
    completion: Positive = 768
    prompt_multiple: Positive = 32
    draws: Positive = 1000  #: of the bootstrap


class ChexReasonConfig(Config):
    """The whole pipeline: sample -> SFT -> GRPO -> evaluation -> report, in one run folder."""

    run: Path
    seed: int = 0
    prompt: str
    model: Model
    mesh: Mesh | None = None  #: null: each device has a copy of the base, and a share of the rows
    data: Data
    sft: Sft
    grpo: Grpo
    evaluation: Evaluation

    def place(self, path: str) -> Path:
        """A path of the config with "{run}" filled in."""
        return Path(path.replace("{run}", str(self.run)))
