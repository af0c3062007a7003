"""Dropout in front of an adapter's first matrix, with masks that follow from what a token is, not from where it stands.

The mask of a token's input to one projection is drawn from (key, group, continuation, index in the path, layer,
projection).
So padding, another layout of the batch or another cut into micro-batches drop the same numbers. The tokens of a shared
prompt have one mask for all its continuations.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Bool, Float, Int, Key
from vlmalign.types import GroupBatch


class Noise(NamedTuple):
    """A key for every token of a batch, and the share of numbers that is dropped."""

    keys: Key[Array, "n t"]
    rate: float
    layer: Int[Array, ""] | int = 0  #: of the decoder, whose masks are drawn


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
    """True where the input of the projection at the path `module` within the noise's layer is kept.

    A token's 64-bit key comes from Threefry; its bits for the single numbers from two rounds of a 32-bit hash of key,
    module and index. Threefry for each of them would be a hundred operations in every kernel that reads a mask, of
    which a deep model has hundreds: MedGemma-4B's SFT gradients took 280 s longer to compile.
    """
    golden = jnp.uint32(0x9E3779B9)
    own = jnp.uint32(zlib.crc32(module.encode())) ^ _mixed(jnp.uint32(noise.layer) * golden)
    place = _mixed(jnp.arange(size, dtype=jnp.uint32) * golden + own)
    data = jax.random.key_data(noise.keys)
    bits = _mixed(_mixed(place ^ data[..., 0, None]) + data[..., 1, None])
    return bits >= jnp.uint32(round(noise.rate * 2**32))


def _mixed(x: Array) -> Array:
    """A bijection of 32-bit numbers in which every bit of x turns every bit of the result with probability near 1/2
    (the constants are those of C. Wellons, Prospecting for hash functions, 2018: lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
