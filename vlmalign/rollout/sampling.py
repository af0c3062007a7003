"""Drawing tokens from logits without a sort and with one random number per row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Bool, Float, Int, Key

#: columns per block of the two-level inverse distribution function
BLOCK = 512


@dataclass(frozen=True)
class Sampling:
    """Which tokens may be drawn, and how likely they are among themselves.

    Temperature 0 takes the most likely token. `top_k` keeps the k most likely tokens (0: all), then `top_p` the
    smallest set of those with at least that share of their mass (Holtzman et al., arXiv 1904.09751), then `min_p`
    those at least that share as likely as the most likely one (arXiv 2407.01082). Tokens as likely as the least likely
    kept one are kept too. `never` are ranges [first, end) of ids that are not drawn: those that the tokenizer does not
    know, of which rewards would see nothing, and those that stand for images.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    never: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling needs temperature >= 0 and 0 < top_p <= 1; found {self.temperature} and {self.top_p}"
            )
        if self.top_k < 0 or not 0 <= self.min_p <= 1:
            raise ValueError(f"sampling needs top_k >= 0 and 0 <= min_p <= 1; found {self.top_k} and {self.min_p}")


class Draw(NamedTuple):
    """Sampled tokens with their log-probability over all tokens, and over the kept ones only."""

    token: Int[Array, "m"]
    logp: Float[Array, "m"]
    kept_logp: Float[Array, "m"]


def top_p_threshold(probabilities: Float[Array, "m vocab"], top_p: float) -> Float[Array, "m 1"]:
    """The largest t such that the tokens of probability >= t hold at least `top_p` of the mass.

    Found exactly, without a sort; see `_largest_threshold`.

    >>> float(top_p_threshold(jnp.array([[0.5, 0.3, 0.15, 0.05]]), 0.75)[0, 0])
    0.30000001192092896
    """
    p = probabilities
    goal = top_p * jnp.sum(p, axis=-1, keepdims=True)
    return _largest_threshold(p, lambda kept: jnp.sum(jnp.where(kept, p, 0.0), axis=-1, keepdims=True) >= goal)


def top_k_threshold(probabilities: Float[Array, "m vocab"], top_k: int) -> Float[Array, "m 1"]:
    """The k-th largest probability: the largest t such that at least `top_k` tokens have probability >= t.

    >>> float(top_k_threshold(jnp.array([[0.5, 0.25, 0.125, 0.125]]), 2)[0, 0])
    0.25
    """
    return _largest_threshold(probabilities, lambda kept: jnp.sum(kept, axis=-1, keepdims=True) >= top_k)


def _largest_threshold(p: Float[Array, "m vocab"], enough: Callable[[Array], Array]) -> Float[Array, "m 1"]:
    """The largest t for which `enough(p >= t)` holds in a row; it holds at 0, and at no t above the row's largest p.

    On a GPU without a loop, since a loop within the loop over tokens would end its CUDA graph: each token would cost
    three launches in place of one. The threshold is the same, bit for bit.
    """
    unrolled = partial(_search, enough=enough, ways=4, unrolled=True)
    return jax.lax.platform_dependent(p, cuda=unrolled, default=partial(_search, enough=enough, ways=2, unrolled=False))


def _search(
    p: Float[Array, "m vocab"], *, enough: Callable[[Array], Array], ways: int, unrolled: bool
) -> Float[Array, "m 1"]:
    """By cutting an interval of bit patterns in `ways` until one is left, since non-negative floats sort like their bits.

    With 2 ways these are 31 passes over the row; with 4 they are 16, each of which adds up three sums of what it reads.
    However it is cut, the answer is the same: sums of fewer non-negative numbers are not larger, rounded ones included,
    so that `enough` changes once.
    """

    def cut(_: int | Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # enough at low, not at high
        step = (high - low + (ways - 1)) // ways
        inner = [low + step * i for i in range(1, ways)]
        holds = [(t < high) & enough(p >= jax.lax.bitcast_convert_type(t, jnp.float32)) for t in inner]
        low = low + step * sum(each.astype(jnp.int32) for each in holds)
        return low, jnp.minimum(low + step, high)

    top = jax.lax.bitcast_convert_type(jnp.max(p, axis=-1, keepdims=True), jnp.int32) + 1
    ends, rounds = (jnp.zeros_like(top), top), -(-31 // (ways.bit_length() - 1))
    if unrolled:
        for index in range(rounds):
            ends = cut(index, ends)
    else:
        ends = jax.lax.fori_loop(0, rounds, cut, ends)
    return jax.lax.bitcast_convert_type(ends[0], jnp.float32)


def keep(probabilities: Float[Array, "m vocab"], sampling: Sampling) -> Float[Array, "m vocab"]:
    """The probabilities with those of tokens that must not be drawn set to 0; not scaled up again."""
    p, vocab = without(probabilities, sampling.never), probabilities.shape[-1]

    def cut(p: Array, kept: Bool[Array, "m vocab"]) -> Array:
        return jnp.where(kept, p, 0.0)

    if 0 < sampling.top_k < vocab:
        p = cut(p, p >= top_k_threshold(p, sampling.top_k))
    if sampling.top_p < 1:
        p = cut(p, p >= top_p_threshold(p, sampling.top_p))
    if sampling.min_p > 0:
        p = cut(p, p >= sampling.min_p * jnp.max(p, axis=-1, keepdims=True))
    return p


def without(
    values: Float[Array, "m vocab"], never: tuple[tuple[int, int], ...], instead: float = 0.0
) -> Float[Array, "m vocab"]:
    """The values with those of ids in the ranges `never` replaced."""
    if not never:
        return values
    column = jnp.arange(values.shape[-1])
    taken = jnp.zeros(column.shape, bool)
    for first, end in never:
        taken |= (column >= first) & (column < end)
    return jnp.where(taken, instead, values)


def in_blocks(weights: Float[Array, "m vocab"]) -> tuple[Float[Array, "m blocks size"], Float[Array, "m blocks"]]:
    """The weights in blocks of `BLOCK` columns, the last one filled with zeros, and the sum of each block."""
    m, vocab = weights.shape
    blocks = jnp.pad(weights, ((0, 0), (0, -vocab % BLOCK))).reshape(m, -1, BLOCK)
    return blocks, jnp.sum(blocks, axis=-1)


def inverse_cdf(
    blocks: Float[Array, "m blocks size"], mass: Float[Array, "m blocks"], uniform: Float[Array, "m"]
) -> Int[Array, "m"]:
    """The token at which the cumulative weight (`in_blocks`) passes `uniform` x total; never one of weight 0.

    Two levels, blocks then tokens within the block, so that only [m, vocab / 512] and [m, 512] are summed in order.
    """
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
    top = jnp.max(z, axis=-1, keepdims=True)
    weights = jnp.exp(z - top)
    blocks, mass = in_blocks(weights)
    total = top + jnp.log(jnp.sum(mass, axis=-1, keepdims=True))  # log-sum-exp of z

    def picked(token: Int[Array, "m"]) -> Float[Array, "m"]:
        return (jnp.take_along_axis(z, token[:, None], axis=-1) - total)[:, 0]

    if sampling.temperature == 0:
        token = jnp.argmax(without(z, sampling.never, -jnp.inf), axis=-1).astype(jnp.int32)
        return Draw(token, picked(token), jnp.zeros(token.shape))
    cuts = sampling.top_k or sampling.top_p < 1 or sampling.min_p
    if cuts:
        blocks, mass = in_blocks(keep(jnp.exp(z - total), sampling))
    elif sampling.never:
        blocks, mass = in_blocks(without(jnp.exp(z - total), sampling.never))
    token = inverse_cdf(blocks, mass, jax.vmap(jax.random.uniform)(keys)).astype(jnp.int32)
    logp = picked(token)
    return Draw(token, logp, logp - jnp.log(jnp.sum(mass, axis=-1)) if cuts or sampling.never else logp)
