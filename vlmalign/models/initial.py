"""First values of parameters, or where nobody draws any their shapes alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlmalign.shapes import Array

#: Whoever draws first values. None: shapes stand in for arrays, and nothing is computed. Traced with `jax.eval_shape`,
#: the shapes of a model of 1,400 parameters took eleven seconds.
Rngs = nnx.Rngs | None
Value = Array | jax.ShapeDtypeStruct


def init_normal(rngs: Rngs, shape: tuple[int, ...], std: float, dtype: jnp.dtype) -> Value:
    """Normal values of standard deviation `std`, drawn in float32 and then cast."""
    if rngs is None:
        return jax.ShapeDtypeStruct(shape, dtype)
    return (std * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)


def init_constant(rngs: Rngs, shape: tuple[int, ...], value: float, dtype: jnp.dtype) -> Value:
    """The same value everywhere."""
    return jax.ShapeDtypeStruct(shape, dtype) if rngs is None else jnp.full(shape, value, dtype)
