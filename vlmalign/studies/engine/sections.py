"""Sections that stages and answers share: devices, reading, adapters, optimisers, shapes, rollouts.

A field marked `FREE` cannot change a result beyond rounding (NUMERICS' tolerance): rows, workers, time-outs, places. It is
recorded with an artefact and never makes it stale (`record`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlmalign.config import FREE, Config
from vlmalign.mesh import MeshSettings
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD, LoraSpec
from vlmalign.training.optimiser import OptimiserSettings

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Bound = Annotated[int, Field(ge=0)] | Share  #: films, or a share of the set (`data.sampling.bounds`)
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Mesh(Config):
    """Devices along each axis, see `mesh`; one of them may be -1: all that the others leave.

    Rows of micro-batches and rollouts must be multiples of replicas x data x fsdp.
    """

    data: int = -1  #: copies of the parameters; batches are cut by rows
    fsdp: int = 1  #: parameters, gradients and moments are cut, and so are batches
    tensor: int = 1  #: heads, feed-forward and vocabulary are cut
    replicas: int = 1  #: copies of everything, one per node or group of nodes

    @property
    def settings(self) -> MeshSettings:
        return MeshSettings(**self.model_dump())

    @model_validator(mode="after")
    def _in_range(self) -> Mesh:
        MeshSettings(**self.model_dump())
        return self


class Reading(Config):
    """How films are read. None of this changes a pixel."""

    workers: Annotated[int, Field(ge=0)] = 0  #: processes that read ahead; 0: films are read when they are needed
    ahead: Positive = 32  #: films read ahead at most (Gemma 3: 9.6 MB each); no fewer than a batch has
    resize_cache: str | None = None  #: folder of resized films, "{run}" the run's; better a folder that runs share
    resize_cache_gib: Annotated[float, Field(gt=0)] = 64.0  #: its limit: the least recently used go first

    def cache_folder(self, run: Path) -> Path | None:
        """Where resized films are kept by a run in this folder."""
        return None if self.resize_cache is None else Path(self.resize_cache.replace("{run}", str(run)))


class Lora(Config):
    """Adapter on the language model's projections."""

    rank: Positive = 16
    alpha: Annotated[float, Field(gt=0)] = 32.0
    targets: tuple[str, ...] = ATTENTION_AND_FEED_FORWARD
    rank_stabilised: bool = False  #: rsLoRA
    magnitude: bool = False  #: DoRA
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  #: of the adapter's inputs, in SFT only

    @property
    def spec(self) -> LoraSpec:
        return LoraSpec(**self.model_dump())

    @field_validator("targets")
    @classmethod
    def _in_one_order(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        LoraSpec(rank=1, alpha=1.0, targets=targets)
        # The order in which adapters are read back from their folders.
        return tuple(target for target in ATTENTION_AND_FEED_FORWARD if target in targets)

    @model_validator(mode="after")
    def _in_range(self) -> Lora:
        self.spec  # noqa: B018  (checks its own fields)
        return self


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

    @property
    def settings(self) -> OptimiserSettings:
        return OptimiserSettings(**self.model_dump())


class Batch(Config):
    """How groups become arrays: rows per micro-batch and the token multiples that lengths are rounded up to."""

    rows: Positive | Literal["auto"]
    tokens: Positive | None = None  #: budget of a micro-batch: long rows are fewer
    prompt_multiple: Positive = 32
    completion_multiple: Positive = 64


class Rollout(Config):
    """How completions are sampled."""

    rows: Annotated[Positive | Literal["auto"], FREE]  #: prompts at once
    group: Positive = 4  #: completions per prompt; GRPO needs at least 2 to compare
    completion: Positive  #: longest, tokens
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    tensor: Annotated[Positive, FREE] = 1  #: devices that share the weights out among them; 1: each has all of them


def split_free(section: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The section as JSON in two parts: what can change a result, and what is `FREE`."""
    binding: dict[str, Any] = {}
    free: dict[str, Any] = {}
    plain = section.model_dump(mode="json", by_alias=True)
    for name, field in type(section).model_fields.items():
        key, value = field.alias or name, getattr(section, name)
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("free"):
            free[key] = plain[key]
        elif isinstance(value, Config):
            binding[key], inner = split_free(value)
            free |= {f"{key}.{inside}": found for inside, found in inner.items()}
        elif isinstance(value, dict) and any(isinstance(item, Config) for item in value.values()):
            parts = {label: split_free(item) for label, item in value.items()}
            binding[key] = {label: part for label, (part, _) in parts.items()}
            free |= {
                f"{key}.{label}.{inside}": found for label, (_, part) in parts.items() for inside, found in part.items()
            }
        else:
            binding[key] = plain[key]
    return binding, free
