"""Importance ratios between two policies from their log-probabilities of the same tokens: masked, finite, TRL's edges.

Shapes: per token [N, K, C]; per sequence [N, K, 1], so that both broadcast against tokens. `mask` is True on tokens
that count. Whatever stands where it is False (padding may hold anything) changes neither values nor gradients.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlmalign.objectives.kl import LARGEST_EXPONENT
from vlmalign.shapes import Array, Bool, Float


def gap(minuend: Array, subtrahend: Array, mask: Bool[Array, "n k c"]) -> Float[Array, "n k c"]:
    """minuend - subtrahend where the mask is True, 0 elsewhere: there 0 x inf would be NaN for the whole batch."""
    # Both sides are replaced before subtracting: the gradient of a `where` around inf - inf would be NaN too.
    return jnp.where(mask, minuend, 0.0) - jnp.where(mask, subtrahend, 0.0)


def clamp(x: Array, low: float | None = None, high: float | None = None) -> Array:
    """x held to [low, high]; at a bound itself the gradient is 1, as in torch (`jnp.clip` halves it).

    On-policy every ratio is exactly 1: a bound of 1 (a clip of 0) must not halve the gradient of every token.
    """
    if low is not None:
        x = jnp.where(x < low, low, x)
    if high is not None:
        x = jnp.where(x > high, high, x)
    return x


def safe_exp(x: Array) -> Array:
    """exp(min(x, 80)): equal to exp wherever float32 can carry the result through a sum, finite beyond."""
    return jnp.exp(clamp(x, high=LARGEST_EXPONENT))


def sequence_sum(x: Float[Array, "n k c"], mask: Bool[Array, "n k c"]) -> Float[Array, "n k 1"]:
    return jnp.sum(jnp.where(mask, x, 0.0), axis=-1, keepdims=True)


def sequence_mean(x: Float[Array, "n k c"], mask: Bool[Array, "n k c"]) -> Float[Array, "n k 1"]:
    """Mean over the tokens that count; 0 for a sequence without any."""
    return sequence_sum(x, mask) / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1)


def importance_ratio(log_ratio: Float[Array, "n k c"], mask: Bool[Array, "n k c"], *, level: str) -> Array:
    """exp(log_ratio) per token, or exp(mean_t log_ratio) per sequence [N, K, 1] (GSPO, arXiv 2507.18071)."""
    return safe_exp(log_ratio if level == "token" else sequence_mean(log_ratio, mask))


def off_policy_mask(
    advantage: Array,
    logp: Float[Array, "n k c"],
    behaviour_logp: Float[Array, "n k c"],
    mask: Bool[Array, "n k c"],
    *,
    threshold: float,
) -> Bool[Array, "n k _"]:
    """True keeps a sequence: its advantage is not negative, or mean_t (behaviour - logp) <= threshold (nat).

    DeepSeek-V3.2, arXiv 2512.02556, eq. 9. NaN in `behaviour_logp` (not recorded) counts as no drift.
    """
    drift = gap(behaviour_logp, jax.lax.stop_gradient(logp), mask)
    drift = sequence_mean(jnp.where(jnp.isnan(drift), 0.0, drift), mask)
    return (advantage >= 0) | (drift <= threshold)
