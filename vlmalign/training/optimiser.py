"""Optimisers with warm-up, a schedule and global-norm clipping (optax)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import optax

from vlmalign.shapes import Array

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class OptimiserSettings:
    """`warmup` is a share of all steps; `clip_norm` None switches clipping off."""

    learning_rate: float
    name: str = "adamw"  #: a key of OPTIMISERS
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01  #: of matrices; biases, norms and DoRA's lengths do not decay
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float | None = 1.0

    def __post_init__(self) -> None:
        if self.name not in OPTIMISERS:
            raise ValueError(f"optimiser must be one of {', '.join(OPTIMISERS)}; found {self.name!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; found {self.schedule!r}")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"warmup is a share of all steps, in [0, 1]; found {self.warmup}")


def matrices(params: Mapping[str, Array]) -> dict[str, bool]:
    """True for what weight decay applies to: matrices, embeddings included."""
    return {name: value.ndim >= 2 for name, value in params.items()}


def _adamw(rate: optax.Schedule, s: OptimiserSettings) -> optax.GradientTransformation:
    return optax.adamw(rate, b1=s.beta1, b2=s.beta2, weight_decay=s.weight_decay, mask=matrices)


def _lion(rate: optax.Schedule, s: OptimiserSettings) -> optax.GradientTransformation:
    return optax.lion(rate, b1=s.beta1, b2=s.beta2, weight_decay=s.weight_decay, mask=matrices)


def _sgd(rate: optax.Schedule, s: OptimiserSettings) -> optax.GradientTransformation:
    return optax.chain(optax.add_decayed_weights(s.weight_decay, mask=matrices), optax.sgd(rate, momentum=s.beta1))


#: name -> AdamW (arXiv 1711.05101), Lion (arXiv 2302.06675), SGD with momentum `beta1`
OPTIMISERS: dict[str, Callable[[optax.Schedule, OptimiserSettings], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "sgd": _sgd,
}


def learning_rate(settings: OptimiserSettings, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine or a line down to 0, or the peak for ever."""
    warm = max(1, round(settings.warmup * steps))
    rest = max(1, steps - warm)
    peak = settings.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[settings.schedule]
    # The first update already moves: step 0 of a warm-up from exactly 0 would be a wasted batch.
    rising = optax.linear_schedule(peak / warm, peak, max(1, warm - 1)) if warm > 1 else optax.constant_schedule(peak)
    return optax.join_schedules([rising, after], [warm])


def build_optimiser(settings: OptimiserSettings, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then the named optimiser. Moments are float32, as the trained parameters are."""
    update = OPTIMISERS[settings.name](learning_rate(settings, steps), settings)
    if settings.clip_norm is None:
        return update
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update)
