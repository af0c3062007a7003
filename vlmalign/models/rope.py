"""Rotary position embedding (Su et al., arXiv 2104.09864), in the half-split layout of Hugging Face checkpoints."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from vlmalign.models.config import Rope
from vlmalign.shapes import Array, Float, Int


def rotary_tables(
    position: Int[Array, "*batch"], rope: Rope, head_dim: int, dtype: jnp.dtype
) -> tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]:
    """Cosine and sine of position * frequency, [..., head_dim / 2], computed in float32 and cast to `dtype`."""
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / head_dim
    frequency = 1.0 / (np.float32(rope.theta) ** exponent) / np.float32(rope.factor)
    angle = position[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def rotate(
    x: Float[Array, "*batch heads head_dim"], tables: tuple[Float[Array, "*batch half"], Float[Array, "*batch half"]]
) -> Float[Array, "*batch heads head_dim"]:
    """Turn each pair (x_i, x_{i + head_dim / 2}) by its angle."""
    cos, sin = tables[0][..., None, :], tables[1][..., None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
