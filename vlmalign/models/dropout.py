"""Dropout in front of an adapter's first matrix, with masks that follow from what a token is, not from where it stands.

The mask of a token's input to one projection is drawn from (key, group, continuation, index in the path, projection).
So padding, another layout of the batch or another cut into micro-batches drop the same numbers. The tokens of a shared
prompt have one mask for all its continuations.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Bool, Float, Key
from vlmalign.types import GroupBatch


class Noise(NamedTuple):
    """A key for every token of a batch, and the share of numbers that is dropped."""

    keys: Key[Array, "n t"]
    rate: float


def token_noise(key: Key[Array, ""], batch: GroupBatch, rate: float) -> Noise:
    """The noise of one optimiser step; `key` is the step's."""

    def one(group: Array, segment: Array, order: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, group), segment), order)

    rows = jax.vmap(jax.vmap(one, (None, 0, 0)))
    # Padding has segment -1; its numbers reach no loss, but a key wants a number that is not negative.
    return Noise(rows(jnp.maximum(batch.group_id, 0), jnp.maximum(batch.segment, 0), batch.order), rate)


def drop(x: Float[Array, "n t size"], noise: Noise, module: str) -> Float[Array, "n t size"]:
    """`x` with each number zeroed with probability `rate`, and divided by 1 - rate where it is kept."""
    # Masks hang on nothing but the keys: left to itself, XLA draws those of all layers first and holds them until they
    # are used, in the backward pass once more (MedGemma-4B, 8 rows: 9.6 GiB). So each waits for its input.
    x, data = jax.lax.optimization_barrier((x, jax.random.key_data(noise.keys)))
    keys = jax.random.wrap_key_data(data, impl=jax.random.key_impl(noise.keys))
    kept = keep_mask(noise._replace(keys=keys), module, x.shape[-1])
    return jnp.where(kept, x / (1.0 - noise.rate), 0.0).astype(x.dtype)


def keep_mask(noise: Noise, module: str, size: int) -> Bool[Array, "n t size"]:
    """True where the input of the projection at the path `module` is kept."""
    own = zlib.crc32(module.encode())

    def one(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, own), 1.0 - noise.rate, (size,))

    return jax.vmap(jax.vmap(one))(noise.keys)
