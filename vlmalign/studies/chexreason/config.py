"""Settings of the ChexReason pipeline. Values the paper does not print are ours, and the YAML files say so."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlmalign.config import Config
from vlmalign.data.schema import LABEL_MAPS
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


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


class Lora(Config):
    """Adapter on the language model's projections."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: tuple[str, ...] = ATTENTION_AND_FEED_FORWARD


class Model(Config):
    """A checkpoint folder and how it is run."""

    path: Path
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "auto"
    remat: Literal["none", "full"] = "none"
    lora: Lora = Lora()


class Optimiser(Config):
    """AdamW; see `training.optimiser`."""

    learning_rate: Annotated[float, Field(gt=0)]
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: Share = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    beta1: Share = 0.9
    beta2: Share = 0.999
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0


class Batch(Config):
    """How groups become arrays: rows per micro-batch and the token multiples that lengths are rounded up to."""

    rows: Positive
    prompt_multiple: Positive = 32
    completion_multiple: Positive = 64


class Sft(Config):
    """Supervised fine-tuning."""

    epochs: Annotated[float, Field(gt=0)]
    batch: Positive  #: examples per update
    shapes: Batch
    optimiser: Optimiser
    checkpoint_every: Positive = 50  #: updates


class Reward(Config):
    """The hard reward; see `rewards.hard`."""

    min_tokens: Annotated[int, Field(ge=0)] = 250
    lambda_len: Share = 0.2


class Rollout(Config):
    """How completions are sampled while training."""

    rows: Positive  #: prompts at once
    group: Annotated[int, Field(ge=2)] = 4  #: completions per prompt
    completion: Positive = 768  #: longest, tokens
    temperature: Annotated[float, Field(gt=0)] = 0.8
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95


class Grpo(Config):
    """Group-relative policy optimisation from the SFT adapter, which is also the reference."""

    steps: Positive
    prompts: Positive  #: per update
    rollout: Rollout
    reward: Reward = Reward()
    shapes: Batch
    optimiser: Optimiser
    beta: Annotated[float, Field(ge=0)] = 0.15
    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.15
    clip_high: Annotated[float, Field(ge=0)] = 0.22
    scale: Literal["none", "group", "batch"] = "none"
    checkpoint_every: Positive = 20


class EvaluationSet(Config):
    """A data set to be scored on; at most `limit` films, drawn by patient."""

    films: Films
    role: Literal["in-schema", "cross-schema"]
    limit: Positive | None = None


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
    data: Data
    sft: Sft
    grpo: Grpo
    evaluation: Evaluation

    def place(self, path: str) -> Path:
        """A path of the config with "{run}" filled in."""
        return Path(path.replace("{run}", str(self.run)))
