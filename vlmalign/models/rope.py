"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from vlmalign.models.config import Rope
from vlmalign.shapes import Array, Float, Int


def frequencies(rope: Rope, head_dim: int) -> Float[np.ndarray, "half"]:
    """Radians per position of each pair, float32.

    Llama 3.1 (as published with the checkpoints): with wavelength w = 2 pi / f and s = (original / w - low) /
    (high - low), f becomes f / factor where w > original / low, stays where w < original / high, and is
    (1 - s) f / factor + s f between.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1.0) / (np.float32(rope.theta) ** exponent)
    if rope.llama3 is None:
        return plain / np.float32(rope.factor)
    low, high, original = rope.llama3.low, rope.llama3.high, rope.llama3.original
    wavelength = 2 * np.pi / plain
    ramp = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return ((1 - ramp) * plain / rope.factor + ramp * plain).astype(np.float32)


def rotary_tables(
    position: Int[Array, "*batch"], rope: Rope, head_dim: int, dtype: jnp.dtype
) -> tuple[Float[Array, "*rows half"], Float[Array, "*rows half"]]:
    """Cosine and sine of position * frequency, [..., head_dim / 2], computed in float32 and cast to `dtype`.

    `position` is [...], or [..., 3] for M-RoPE (Qwen2-VL, arXiv 2409.12191).
    """
    frequency = frequencies(rope, head_dim)
    if rope.sections is None:
        angle = position[..., None].astype(jnp.float32) * frequency
    else:
        coordinate = np.repeat(np.arange(3), rope.sections)  # [half]: which coordinate turns each pair
        angle = jnp.take(position, coordinate, axis=-1).astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(
    x: Float[Array, "*batch heads head_dim"], tables: tuple[Float[Array, "*#batch half"], Float[Array, "*#batch half"]]
) -> Float[Array, "*batch heads head_dim"]:
    """Turn each pair (x_i, x_{i + head_dim / 2}) by its angle."""
    cos, sin = tables[0][..., None, :], tables[1][..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
