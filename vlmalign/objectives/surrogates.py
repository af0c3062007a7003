"""What each loss of the GRPO family maximises at a token, from the ratio c, the advantage A and logp.

    clip    min(min(c, delta) A, clip(c, 1 - eps_low, 1 + eps_high) A)
            PPO, arXiv 1707.06347, eq. 7; eps_high != eps_low: DAPO, arXiv 2503.14476, eq. 10;
            delta, a cap that also binds where A < 0: INTELLECT-2, arXiv 2505.07291
    cispo   stop_gradient(min(c, eps_high)) A logp                MiniMax-M1, arXiv 2506.13585; eps_high is the cap itself
    sapo    (4 / tau) sigmoid(tau (c - 1)) A, tau by the sign of A              SAPO, arXiv 2511.20347
    vespo   stop_gradient(phi(w)) A logp, phi(w) = e^lambda w^k e^(-lambda w), w the product of the sequence's ratios
            VESPO, arXiv 2602.10693
    gmpo    exp(mean_t clipped log c_t) A, the clip (in log space) on the side where moving on would gain
            GMPO, arXiv 2507.20673

Arrays are [N, K, C], or [N, K, 1] where a number belongs to a whole sequence.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from vlmalign.objectives.ratio import clamp, safe_exp, sequence_mean, sequence_sum
from vlmalign.shapes import Array, Bool, Float

#: VESPO's own bounds on log ratios: a token's, and the smallest weight a sequence can have
VESPO_LOG_LIMIT = 20.0
VESPO_LOG_FLOOR = math.log(1e-8)


def clip_surrogate(ratio: Array, advantage: Array, *, low: float, high: float, delta: float | None) -> Array:
    """`low` and `high` are distances from 1, `delta` a bound on the ratio itself."""
    inside = clamp(ratio, 1 - low, 1 + high)
    return jnp.minimum(clamp(ratio, high=delta) * advantage, inside * advantage)


def cispo_surrogate(ratio: Array, advantage: Array, logp: Float[Array, "n k c"], *, high: float) -> Array:
    """`high` bounds the ratio itself (the papers recommend about 5), not its distance from 1."""
    return jax.lax.stop_gradient(clamp(ratio, high=high)) * advantage * logp


def sapo_surrogate(ratio: Array, advantage: Array, *, tau_positive: float, tau_negative: float) -> Array:
    """The gate is 2 / tau at c = 1 with slope 1, and saturates on both sides instead of clipping."""
    tau = jnp.where(advantage > 0, tau_positive, tau_negative)
    return jax.nn.sigmoid(tau * (ratio - 1)) * 4 / tau * advantage


def vespo_weight(
    log_ratio: Float[Array, "n k c"],
    rollout_ratio: Float[Array, "n k c"] | None,
    advantage: Array,
    mask: Bool[Array, "n k c"],
    *,
    positive: tuple[float, float],
    negative: tuple[float, float],
) -> Float[Array, "n k _"]:
    """phi(w) per sequence, a constant of the loss, phi(1) = 1; `positive` and `negative` are (k, lambda) by the sign of A.

    `rollout_ratio` (per token, bounded) is multiplied into w, which is then policy over rollout engine.
    """
    log_w = sequence_sum(clamp(log_ratio, -VESPO_LOG_LIMIT, VESPO_LOG_LIMIT), mask)
    if rollout_ratio is not None:
        # log 0 of a masked ratio is held at the floor.
        logs = jnp.log(jnp.maximum(rollout_ratio, 1e-30))
        log_w = log_w + sequence_sum(clamp(logs, VESPO_LOG_FLOOR, VESPO_LOG_LIMIT), mask)
    log_w = clamp(log_w, VESPO_LOG_FLOOR, VESPO_LOG_LIMIT)
    k = jnp.where(advantage >= 0, positive[0], negative[0])
    rate = jnp.where(advantage >= 0, positive[1], negative[1])
    phi = jnp.exp(rate + k * log_w - rate * jnp.exp(log_w))
    # A k far above lambda can overflow at w = k / lambda; a sequence no weight can be given to is left out.
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(phi), phi, 0.0))


def gmpo_ratio(
    log_ratio: Float[Array, "n k c"],
    advantage: Array,
    mask: Bool[Array, "n k c"],
    *,
    low: float,
    high: float,
) -> Float[Array, "n k 1"]:
    """The geometric mean of clipped ratios over the tokens of `mask`; `low` and `high` bound |log c|."""
    held = clamp(log_ratio, -low, high)
    clipped = jnp.where(advantage > 0, jnp.minimum(log_ratio, held), jnp.maximum(log_ratio, held))
    return safe_exp(sequence_mean(clipped, mask))
