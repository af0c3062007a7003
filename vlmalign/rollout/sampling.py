"""Drawing tokens from logits without a sort and with one random number per row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Float, Int, Key

#: columns per block of the two-level inverse distribution function
BLOCK = 512


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 takes the most likely token. `top_p` keeps the smallest set of tokens of at least that mass."""

    temperature: float = 1.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling needs temperature >= 0 and 0 < top_p <= 1; found {self.temperature} and {self.top_p}"
            )


class Draw(NamedTuple):
    """Sampled tokens with their log-probability over all tokens, and over the kept ones only."""

    token: Int[Array, "m"]
    logp: Float[Array, "m"]
    kept_logp: Float[Array, "m"]


def top_p_threshold(probabilities: Float[Array, "m vocab"], top_p: float) -> Float[Array, "m 1"]:
    """The largest t such that the tokens of probability >= t hold at least `top_p` of the mass.

    Found exactly by bisection over the bit pattern (non-negative floats sort like their bits), 31 passes and no
    sort. Tokens as likely as the least likely kept one are all kept.

    >>> float(top_p_threshold(jnp.array([[0.5, 0.3, 0.15, 0.05]]), 0.75)[0, 0])
    0.30000001192092896
    """
    p = probabilities
    goal = top_p * jnp.sum(p, axis=-1, keepdims=True)

    def halve(_: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # mass(low) >= goal > mass(high)
        middle = low + (high - low) // 2
        threshold = jax.lax.bitcast_convert_type(middle, jnp.float32)
        enough = jnp.sum(jnp.where(p >= threshold, p, 0.0), axis=-1, keepdims=True) >= goal
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    top = jax.lax.bitcast_convert_type(jnp.max(p, axis=-1, keepdims=True), jnp.int32) + 1
    low, _ = jax.lax.fori_loop(0, 31, halve, (jnp.zeros_like(top), top))
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def inverse_cdf(weights: Float[Array, "m vocab"], uniform: Float[Array, "m"]) -> Int[Array, "m"]:
    """The token at which the cumulative weight passes `uniform` x total; never one of weight 0.

    Two levels, blocks then tokens within the block, so that only [m, vocab / 512] and [m, 512] are summed in order.
    """
    m, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(m, -1, BLOCK)
    mass = jnp.sum(blocks, axis=-1)  # [m, blocks]
    target = uniform * jnp.sum(mass, axis=-1)
    which, before = _last_passed(mass, target)
    inside = jnp.take_along_axis(blocks, which[:, None, None], axis=1)[:, 0]  # [m, BLOCK]
    offset, _ = _last_passed(inside, target - before)
    return which * BLOCK + offset


def _last_passed(weights: Float[Array, "m size"], target: Float[Array, "m"]) -> tuple[Array, Array]:
    """The last entry of positive weight whose preceding weights sum to <= target, and that sum."""
    before = jnp.cumsum(weights, axis=-1) - weights
    column = jnp.arange(weights.shape[-1])
    passed = (weights > 0) & (before <= target[:, None])
    # Rounding can leave a block whose first weight already exceeds what is left of the target: take that one.
    first = jnp.argmax(weights > 0, axis=-1)
    index = jnp.maximum(jnp.max(jnp.where(passed, column, -1), axis=-1), first)
    return index, jnp.take_along_axis(before, index[:, None], axis=-1)[:, 0]


def draw(logits: Float[Array, "m vocab"], keys: Key[Array, "m"], sampling: Sampling) -> Draw:
    """One token per row. The log-probabilities are of the tempered distribution; greedy reports temperature 1."""
    z = logits.astype(jnp.float32) / (sampling.temperature or 1.0)
    total = jax.nn.logsumexp(z, axis=-1, keepdims=True)
    if sampling.temperature == 0:
        token = jnp.argmax(z, axis=-1)
        logp = jnp.take_along_axis(z - total, token[:, None], axis=-1)[:, 0]
        return Draw(token.astype(jnp.int32), logp, jnp.zeros_like(logp))
    p = jnp.exp(z - total)
    if sampling.top_p < 1:
        p = jnp.where(p >= top_p_threshold(p, sampling.top_p), p, 0.0)
    uniform = jax.vmap(jax.random.uniform)(keys)
    token = inverse_cdf(p, uniform)
    logp = jnp.take_along_axis(z - total, token[:, None], axis=-1)[:, 0]
    return Draw(token.astype(jnp.int32), logp, logp - jnp.log(jnp.sum(p, axis=-1)))
