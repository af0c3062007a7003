"""Normalisations, computed in float32 (`product.wide`) whatever the dtype of their input."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlmalign.models.initial import Rngs, init_constant
from vlmalign.models.product import wide
from vlmalign.shapes import Array, Float


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight). Gemma stores weights around 0 (offset 1)."""

    def __init__(self, size: int, *, eps: float, offset: float, dtype: jnp.dtype, dim: str, rngs: Rngs):
        self.weight = nnx.Param(init_constant(rngs, (size,), 1.0 - offset, dtype), dims=(dim,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wider = x.astype(wide(x.dtype))
        normed = wider * jax.lax.rsqrt(jnp.mean(wider * wider, axis=-1, keepdims=True) + self.eps)
        return (normed * (self.offset + self.weight[...].astype(wider.dtype))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) * weight + bias."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype, dim: str, rngs: Rngs):
        self.weight = nnx.Param(init_constant(rngs, (size,), 1.0, dtype), dims=(dim,))
        self.bias = nnx.Param(init_constant(rngs, (size,), 0.0, dtype), dims=(dim,))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch size"]) -> Float[Array, "*batch size"]:
        wider = x.astype(wide(x.dtype))
        centred = wider - jnp.mean(wider, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(wider.dtype) + self.bias[...].astype(wider.dtype)).astype(x.dtype)
