"""A study in the numbers that decide what it needs: shapes of batches, passes per step, steps. `read` makes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import optax

from vlmalign.models.config import SiglipConfig
from vlmalign.models.model import Model
from vlmalign.rollout.sampling import Sampling
from vlmalign.training.step import Objective
from vlmalign.types import Layout

#: images that `rollout.features.FeatureStore` encodes at once
CHUNK = 16


@dataclass(frozen=True)
class Lengths:
    """Tokens of a stage's texts. `known` says where each number is from."""

    prompt: int  #: of the longest prompt, its images included
    answer: int  #: of the longest answer that is learnt from
    completion: int  #: of a sampled completion, on average
    images: int  #: of a prompt's images: soft tokens
    known: Mapping[str, str] = field(compare=False)


@dataclass(frozen=True)
class Sampled:
    """Rollouts of one kind. Rows are those of all devices together."""

    name: str
    rows: int  #: prompts at once
    group: int
    completion: int  #: the limit, tokens
    sampling: Sampling
    prompt: int  #: padded, tokens
    lengths: Lengths
    prompts: int  #: per rollout
    count: int  #: rollouts

    @property
    def shape(self) -> tuple:
        """What its programs follow from."""
        return self.rows, self.group, self.completion, self.sampling, self.prompt, self.lengths.images


@dataclass(frozen=True)
class Update:
    """Training steps of a stage, or of several that run the same programs. Rows and groups are those of all devices
    together."""

    stages: tuple[str, ...]
    objective: Objective
    optimiser: optax.GradientTransformation
    layout: Layout
    rows: int  #: of a micro-batch
    groups: int  #: of an optimiser batch
    steps: int  #: of all its stages together
    recorded: tuple[str, ...]  #: what a batch brings along beside its tokens
    lengths: Lengths
    epoch: float  #: steps in one pass over its data; 0: not known
    rollout: Sampled | None  #: what it learns from, where it samples that itself
    open_rows: bool = False  #: the config leaves them to the plan
    open_rollout: bool = False  #: and those of its rollouts

    @property
    def name(self) -> str:
        return ", ".join(self.stages)

    @property
    def micro_batches(self) -> int:
        return -(-self.groups // self.rows)

    @property
    def scores_first(self) -> bool:
        """The policy scores its own completions before the first update."""
        return "old_logp" in self.recorded


@dataclass(frozen=True)
class Workload:
    """Everything that a study makes the devices do with one model."""

    model: Model
    bases: tuple[str, ...]  #: the stages of kind model that it is
    stages: tuple[Update, ...]  #: what is trained, in order
    films: int  #: distinct ones of the training stages
    evaluation: tuple[Sampled, ...]
    left_out: tuple[str, ...]  #: work of the study whose size is not known
    open_remat: bool = False  #: the config leaves it to the plan

    def __getitem__(self, name: str) -> Update:
        """The update of this name, or of a stage of this name."""
        return next(update for update in self.stages if name in (update.name, *update.stages))

    @property
    def encodes(self) -> bool:
        """Whether images are encoded, by a tower whose programs have one shape."""
        shown = any(each.lengths.images for each in (*self.stages, *self.evaluation))
        return shown and isinstance(self.model.config.vision, SiglipConfig)
