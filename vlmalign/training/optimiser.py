"""AdamW with warm-up, a schedule and global-norm clipping (optax)."""

from __future__ import annotations

from dataclasses import dataclass

import optax

SCHEDULES = ("cosine", "linear", "constant")


@dataclass(frozen=True)
class OptimiserSettings:
    """`warmup` is a share of all steps; `clip_norm` None switches clipping off."""

    learning_rate: float
    schedule: str = "cosine"
    warmup: float = 0.05
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float | None = 1.0


def learning_rate(settings: OptimiserSettings, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then a cosine or a line down to 0, or the peak for ever."""
    warm = max(1, round(settings.warmup * steps))
    rest = max(1, steps - warm)
    peak = settings.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }
    if settings.schedule not in after:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; found {settings.schedule!r}")
    # The first update already moves: step 0 of a warm-up from exactly 0 would be a wasted batch.
    rising = optax.linear_schedule(peak / warm, peak, max(1, warm - 1)) if warm > 1 else optax.constant_schedule(peak)
    return optax.join_schedules([rising, after[settings.schedule]], [warm])


def build_optimiser(settings: OptimiserSettings, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov and Hutter, arXiv 1711.05101). Moments are float32."""
    adamw = optax.adamw(
        learning_rate(settings, steps), b1=settings.beta1, b2=settings.beta2, weight_decay=settings.weight_decay
    )
    if settings.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
