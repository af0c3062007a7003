"""The two stages that learn from given answers: supervised fine-tuning and preference optimisation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlmalign.config import Config
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.studies.align.data_config import Examples
from vlmalign.studies.chexreason.config import Batch, Optimiser
from vlmalign.studies.run_config import Positive


class Stage(Config):
    """What every stage has."""

    shapes: Batch
    optimiser: Optimiser
    checkpoint_every: Positive = 50  #: updates


class Epochs(Stage):
    """A stage that goes over its data; its length in one of two units."""

    data: Examples
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    steps: Positive | None = None  #: updates
    batch: Positive  #: examples, or pairs, per update

    @model_validator(mode="after")
    def _one_length(self) -> Epochs:
        if (self.epochs is None) == (self.steps is None):
            found = "neither" if self.epochs is None else "both"
            raise ValueError(f"give either epochs or steps, found {found}")
        return self

    def length(self, examples: int) -> int:
        """Updates on this many examples."""
        assert self.epochs is not None or self.steps is not None
        return self.steps if self.epochs is None else max(1, round(self.epochs * examples / self.batch))


class ExampleValidation(Config):
    """Held-out rows, measured every so many updates and after the last one."""

    data: Examples
    every: Positive  #: updates
    patience: Positive | None = None  #: evaluations in a row without a better one before the stage ends

    @model_validator(mode="after")
    def _better_than_what(self) -> ExampleValidation:
        return needs_best(self)


class SftValidation(ExampleValidation):
    """Measures "validation/loss": negative log-likelihood, nat per token."""

    best: Literal["loss"] | None = None  #: keep, and go on from, the state of the lowest; None: the last state


class DpoValidation(ExampleValidation):
    """Measures "validation/loss" and "validation/accuracy": the share of pairs whose chosen answer has the higher reward."""

    best: Literal["loss", "accuracy"] | None = (
        None  #: keep, and go on from, the state of the best; None: the last state
    )


class Sft(Epochs):
    """Supervised fine-tuning on {"messages": [...]}; an assistant's turn may hold its loss "weight"."""

    kind: Literal["sft"] = "sft"
    loss: Literal["nll", "dft"] = "nll"  #: see `objectives.sft`
    validation: SftValidation | None = None


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


class Dpo(Epochs):
    """Preference optimisation on {"prompt", "chosen", "rejected"}; the stage's first policy is the reference."""

    kind: Literal["dpo"] = "dpo"
    objective: DpoObjective = DpoObjective()
    validation: DpoValidation | None = None


def needs_best(validation: Any) -> Any:
    """Raises ValueError for a patience that does not know what is better."""
    if validation.patience is not None and validation.best is None:
        raise ValueError("patience needs to know what is better: set best to the number that decides")
    return validation
