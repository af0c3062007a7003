"""Log-probabilities of given tokens from hidden states, a chunk of tokens at a time: never [tokens, vocab] at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from vlmalign.mesh import per_shard
from vlmalign.models.product import plain_product, product, wide
from vlmalign.shapes import Array, Float, Int


class TokenScores(NamedTuple):
    """float32, natural logarithms."""

    logp: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    collision: Float[Array, "*batch"] | None = None  #: log sum_v p(v)^2, where asked for


def score_logits(logits: Float[Array, "m vocab"], tokens: Int[Array, "m"], *, collision: bool = False) -> TokenScores:
    """logp = z_y - logsumexp(z), entropy = logsumexp(z) - sum p z, collision = logsumexp(2 z) - 2 logsumexp(z); float32.

    >>> found = score_logits(jnp.zeros((1, 4)), jnp.array([2]), collision=True)
    >>> [round(float(x[0]), 4) for x in found]
    [-1.3863, 1.3863, -1.3863]
    """
    z = logits.astype(wide(logits.dtype))
    top = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    # One array of exponentials serves all sums, and the gradient: on CPUs its making costs as much as a product.
    below = z - top
    weight = jnp.exp(below)
    total = jnp.sum(weight, axis=-1)
    log_total = jnp.log(total)
    picked = jnp.take_along_axis(below, tokens[:, None], axis=-1)[:, 0]
    return TokenScores(
        picked - log_total,
        log_total - jnp.sum(weight * below, axis=-1) / total,
        jnp.log(jnp.sum(weight * weight, axis=-1)) - 2 * log_total if collision else None,
    )


def token_logprobs(
    states: Float[Array, "*batch embed"],
    head: Float[Array, "vocab embed"],
    tokens: Int[Array, "*batch"],
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk: int = 1024,
    collision: bool = False,
) -> TokenScores:
    """Log-probability of each token under softmax(cap(head . state) / temperature), and that distribution's entropy.

    The head runs over `chunk` tokens at a time, so that at most [chunk, vocab] logits exist. Logits accumulate in
    float32: in bfloat16 the log-sum-exp would be off by 0.1 nat. Under a mesh each device chunks its own tokens: chunks
    across devices would gather the states of all of them.

    Where log-probabilities alone are differentiated, and a frozen head, logits are made once: the forward pass keeps
    d logp / d state, [tokens, embed]. Otherwise the backward pass makes them again.
    """
    how = _How(temperature, softcap, chunk, collision)
    with jax.named_scope("token_logprobs"):
        scores = _scores(states.reshape(-1, states.shape[-1]), head, tokens.reshape(-1), how)
    return jax.tree.map(lambda s: s.reshape(tokens.shape), scores)


#: (states, head, dtype) -> logits
Multiply = Callable[[Array, Array, jnp.dtype], Array]


class _How(NamedTuple):
    temperature: float
    softcap: float | None
    chunk: int
    collision: bool

    def scores(self, raw: Float[Array, "m vocab"], tokens: Int[Array, "m"]) -> TokenScores:
        """Of what the head gave."""
        z = raw if self.softcap is None else self.softcap * jnp.tanh(raw / self.softcap)
        return score_logits(z / self.temperature, tokens, collision=self.collision)


def _plain_scores(states: Float[Array, "m embed"], head: Array, tokens: Int[Array, "m"], how: _How) -> TokenScores:
    return _scores_by(product, states, head, tokens, how)


def _scores_by(multiply: Multiply, states: Array, head: Array, tokens: Array, how: _How) -> TokenScores:
    def one(x: Array, y: Array, head: Array) -> TokenScores:
        return how.scores(multiply(x, head, wide(x.dtype)), y)

    return _in_chunks(jax.checkpoint(one), states, tokens, head, how.chunk)


_scores = jax.custom_vjp(_plain_scores, nondiff_argnums=(3,))


def _scores_and_slopes(states: Any, head: Any, tokens: Any, how: _How) -> tuple[TokenScores, tuple]:
    """The arguments say whether they are differentiated (`symbolic_zeros`)."""

    def one(x: Array, y: Array, head: Array) -> tuple[TokenScores, Array]:
        raw = plain_product(x, head, wide(x.dtype))
        scores, back = jax.vjp(lambda raw: how.scores(raw, y), raw)
        zeros = jax.tree.map(jnp.zeros_like, scores)
        (slope,) = back(zeros._replace(logp=jnp.ones_like(scores.logp)))
        return scores, jnp.einsum("mv,ve->me", slope.astype(x.dtype), head)

    kept = (states.value, head.value, tokens.value)
    if head.perturbed:
        return _scores_by(plain_product, *kept, how), (*kept, None)
    scores, slopes = _in_chunks(one, *(kept[i] for i in (0, 2, 1)), how.chunk)
    return scores, (*kept, slopes)


def _scores_backward(how: _How, kept: tuple, out: TokenScores) -> tuple[Array, Array | None, None]:
    states, head, tokens, slopes = kept
    others = [x for x in (out.entropy, out.collision) if x is not None]
    if slopes is not None and all(isinstance(x, SymbolicZero) for x in others):
        if isinstance(out.logp, SymbolicZero):
            return jnp.zeros_like(states), None, None
        return (out.logp[:, None] * slopes).astype(states.dtype), None, None
    out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x, out)
    _, back = jax.vjp(lambda states, head: _plain_scores(states, head, tokens, how), states, head)
    return (*back(out), None)


_scores.defvjp(_scores_and_slopes, _scores_backward, symbolic_zeros=True)


def _in_chunks(one: Callable[..., Any], states: Array, tokens: Array, head: Array, chunk: int) -> Any:
    """`one(states, tokens, head)` for `chunk` tokens at a time, each device on its own ones."""

    def share(states: Array, tokens: Array, head: Array) -> Any:
        count = tokens.shape[0]
        if count <= chunk:
            return one(states, tokens, head)
        pad = -count % chunk
        pieces = (
            jnp.pad(states, ((0, pad), (0, 0))).reshape(-1, chunk, states.shape[-1]),
            jnp.pad(tokens, (0, pad)).reshape(-1, chunk),
        )
        found = jax.lax.map(lambda piece: one(*piece, head), pieces)
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], found)

    return per_shard(share, cut=(True, True, False))(states, tokens, head)
