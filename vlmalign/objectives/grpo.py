"""Group-relative policy optimisation with Dr. GRPO's normaliser, an asymmetric clip and a k3 penalty.

    c_t = exp(logp_t - logp_old_t)
    L   = - sum_t [ min(c_t A, clip(c_t, 1 - eps_low, 1 + eps_high) A) - beta k3_t ] / (B x L_max)
    k3  = exp(d) - d - 1,  d = ref_logp_t - logp_t            (Schulman's estimator of KL(policy || reference))

GRPO: arXiv 2402.03300, eq. 3; the constant normaliser B x L_max (B completions in the optimiser batch, L_max the
longest completion allowed): Dr. GRPO, arXiv 2503.20783; the asymmetric clip: DAPO, arXiv 2503.14476, eq. 10.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlmalign.shapes import Array
from vlmalign.types import GroupBatch, LossParts, Scores


@dataclass(frozen=True)
class GrpoSettings:
    """`clip_low` and `clip_high` are distances from 1; `beta` weighs the penalty (0 needs no reference pass)."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    max_completion: int = 768  #: tokens

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(
                f"clip bounds must satisfy 0 <= clip_low < 1 and clip_high >= 0; "
                f"found {self.clip_low} and {self.clip_high}"
            )
        if self.beta < 0:
            raise ValueError(f"beta must be >= 0, found {self.beta}; a negative one rewards leaving the reference")
        if self.max_completion < 1:
            raise ValueError(f"max_completion must be >= 1 token, found {self.max_completion}")


def grpo_loss(scores: Scores, batch: GroupBatch, *, settings: GrpoSettings) -> LossParts:
    """Part "policy": the clipped surrogate plus beta times the penalty, summed over completion tokens.

    `scores.old_logp` None means one update per rollout: the old policy is the current one, and c = 1 with a gradient.
    """
    weight = batch.weight
    real = weight > 0

    def gap_to(other: Array) -> Array:
        # Whatever stands on padding must not overflow in the exponentials below: 0 x inf is NaN for the whole batch.
        return jnp.where(real, other - scores.logp, 0.0)

    old = jax.lax.stop_gradient(scores.logp) if scores.old_logp is None else scores.old_logp
    ratio = jnp.exp(-gap_to(old))
    advantage = batch.advantage[..., None]
    clipped = jnp.clip(ratio, 1 - settings.clip_low, 1 + settings.clip_high)
    surrogate = jnp.minimum(ratio * advantage, clipped * advantage)
    per_token = -surrogate
    count = jnp.sum(weight)
    metrics = {
        "surrogate": (jnp.sum(weight * surrogate), count),
        "ratio": (jnp.sum(weight * ratio), count),
        "clipped": (jnp.sum(weight * (ratio * advantage > clipped * advantage)), count),
        "entropy": (jnp.sum(weight * scores.entropy), count),
    }
    if settings.beta > 0:
        gap = gap_to(scores.ref_logp)
        penalty = jnp.exp(gap) - gap - 1
        per_token = per_token + settings.beta * penalty
        metrics["kl"] = (jnp.sum(weight * penalty), count)
    if scores.rollout_logp is not None:
        drift = jnp.abs(gap_to(scores.rollout_logp))
        metrics["rollout_gap"] = (jnp.sum(weight * drift), count)
    return LossParts(sums={"policy": jnp.sum(weight * per_token)}, metrics=jax.lax.stop_gradient(metrics))


def grpo_counts(batches: list[GroupBatch], *, settings: GrpoSettings) -> dict[str, float]:
    """Completions in the optimiser batch x longest completion allowed (host arrays)."""
    completions = sum(int(np.sum(b.group_id >= 0)) * b.layout.group for b in batches)
    return {"policy": float(completions * settings.max_completion)}
