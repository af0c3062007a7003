"""Log-probabilities of given tokens from hidden states, a chunk of tokens at a time: never [tokens, vocab] at once."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.mesh import per_shard
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
    z = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(z, axis=-1)
    picked = jnp.take_along_axis(z, tokens[:, None], axis=-1)[:, 0]
    mean = jnp.sum(jax.nn.softmax(z, axis=-1) * z, axis=-1)
    return TokenScores(
        picked - total, total - mean, jax.nn.logsumexp(2 * z, axis=-1) - 2 * total if collision else None
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

    The head runs over `chunk` tokens at a time and is recomputed in the backward pass, so that at most
    [chunk, vocab] logits exist. Logits accumulate in float32: in bfloat16 the log-sum-exp would be off by 0.1 nat.
    Under a mesh each device chunks its own tokens: chunks across devices would gather the states of all of them.
    """

    def share(states: Array, head: Array, tokens: Array) -> TokenScores:
        @jax.checkpoint
        def one(piece: tuple[Array, Array]) -> TokenScores:
            x, y = piece
            z = jnp.einsum("md,vd->mv", x, head, preferred_element_type=jnp.float32)
            if softcap is not None:
                z = softcap * jnp.tanh(z / softcap)
            return score_logits(z / temperature, y, collision=collision)

        count = tokens.shape[0]
        if count <= chunk:
            return one((states, tokens))
        pad = -count % chunk
        pieces = (
            jnp.pad(states, ((0, pad), (0, 0))).reshape(-1, chunk, states.shape[-1]),
            jnp.pad(tokens, (0, pad)).reshape(-1, chunk),
        )
        return jax.tree.map(lambda s: s.reshape(-1)[:count], jax.lax.map(one, pieces))

    with jax.named_scope("token_logprobs"):
        scores = per_shard(share, cut=(True, False, True))(
            states.reshape(-1, states.shape[-1]), head, tokens.reshape(-1)
        )
    return jax.tree.map(lambda s: s.reshape(tokens.shape), scores)
