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

from vlmalign.shapes import Array, Bool, Float, Key, UInt
from vlmalign.types import GroupBatch

#: 2^32 over the golden ratio: its multiples are far apart
_GOLDEN = 0x9E3779B9


class Noise(NamedTuple):
    """What the masks of a batch's tokens are drawn from, and the share of numbers that is dropped."""

    keys: UInt[Array, "2 n t"]  #: 64 random bits for every token
    inputs: UInt[Array, " size"]  #: 32 for every input of a projection, as many as the widest has
    rate: float
    layer: UInt[Array, ""] | int = 0  #: of the decoder, whose masks are drawn


def token_noise(key: Key[Array, ""], batch: GroupBatch, rate: float, *, size: int) -> Noise:
    """The noise of one optimiser step; `key` is the step's, `size` the most inputs of a projection."""

    def one(group: Array, segment: Array, order: Array) -> Array:
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, group), segment), order)

    rows = jax.vmap(jax.vmap(one, (None, 0, 0)))
    # Padding has segment -1; its numbers reach no loss, but a key wants a number that is not negative.
    keys = rows(jnp.maximum(batch.group_id, 0), jnp.maximum(batch.segment, 0), batch.order)
    inputs = _mixed(jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(_GOLDEN))
    return Noise(jnp.moveaxis(jax.random.key_data(keys), -1, 0), inputs, rate)


def drop(x: Float[Array, "n t size"], noise: Noise, module: str) -> Float[Array, "n t size"]:
    """`x` with each number zeroed with probability `rate`, and divided by 1 - rate where it is kept."""
    # Masks hang on nothing but the keys: left to itself, XLA draws those of all layers first and holds them until they
    # are used, in the backward pass once more (MedGemma-4B, 8 rows: 9.6 GiB). So each waits for its input. The layer's
    # number waits too: as a constant it would give every layer kernels of its own (SFT gradients of that model on a GPU:
    # 409 kernels in place of 172).
    x, keys, layer = jax.lax.optimization_barrier((x, noise.keys, jnp.uint32(noise.layer)))
    kept = keep_mask(noise._replace(keys=keys, layer=layer), module, x.shape[-1])
    return jnp.where(kept, x / (1.0 - noise.rate), 0.0).astype(x.dtype)


def keep_mask(noise: Noise, module: str, size: int) -> Bool[Array, "n t size"]:
    """True where the input of the projection at the path `module` within the noise's layer is kept.

    A token's 64 bits come from Threefry; those of the single numbers from a 32-bit hash of them, the place of the
    projection and the hashed index of the input. Threefry for each of them would be a hundred operations in every kernel
    that reads a mask, of which a deep model has hundreds: MedGemma-4B's SFT gradients took 280 s longer to compile.
    """
    first, second = noise.keys
    place = jnp.uint32(noise.layer) * jnp.uint32(_GOLDEN) ^ jnp.uint32(zlib.crc32(module.encode()))
    bits = _mixed((noise.inputs[:size] ^ (first ^ place)[..., None]) + second[..., None])
    return bits >= jnp.uint32(round(noise.rate * 2**32))


def _mixed(x: Array) -> Array:
    """A bijection of 32-bit numbers in which every bit of x turns every bit of the result with probability near 1/2
    (the constants are those of C. Wellons, Prospecting for hash functions, 2018: lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
