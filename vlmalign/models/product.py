"""Products in two precisions: factors in the dtype of activations, sums in float32 where a result or gradient wants it.

Rules for gradients call the plain functions, never the ones that have such rules: a gradient can then be differentiated
forwards, as Hessian-vector products do.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Float


def wide(dtype: jnp.dtype) -> jnp.dtype:
    """What sums and slopes are taken in: float32, or `dtype` itself where it is wider.

    >>> wide(jnp.dtype("bfloat16")).name
    'float32'
    """
    return jnp.promote_types(dtype, jnp.float32)


def plain_product(x: Array, weight: Array, dtype: jnp.dtype) -> Array:
    """`product` without its rule for gradients."""
    return jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), preferred_element_type=dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(
    x: Float[Array, "*batch size_in"], weight: Float[Array, "size_out size_in"], dtype: jnp.dtype
) -> Float[Array, "*batch size_out"]:
    """x W^T in `dtype`, each W rounded to the dtype of x first.

    The gradient of W comes in W's own dtype straight from the float32 sums of the matrix unit: a float32 W used by
    bfloat16 activations gets a gradient that was never rounded to bfloat16, and devices that each hold a part of the
    batch add up float32. Cotangents are rounded to the dtype of x: left to JAX, a float32 cotangent of bfloat16
    factors makes a float32 copy of W (2.5 GiB for Gemma's head) and a product at the rate of float32.
    """
    return plain_product(x, weight, dtype)


def _forward(x: Array, weight: Array, dtype: jnp.dtype) -> tuple[Array, tuple[Array, Array]]:
    return plain_product(x, weight, dtype), (x, weight)


def _backward(dtype: jnp.dtype, kept: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    del dtype
    x, weight = kept
    out = out.astype(x.dtype)
    return jnp.einsum("...o,oi->...i", out, weight.astype(x.dtype)), _outer(out, x, weight.dtype)


def _outer(out: Array, x: Array, dtype: jnp.dtype) -> Array:
    """sum_t out_t x_t^T. On CPUs the left factor of such a product is transposed first: let that be the narrow one."""
    # One dim of tokens: XLA's CPU compiler has no product of bfloat16 into float32 over two.
    out, x = out.reshape(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
    if out.shape[-1] > x.shape[-1]:
        return jnp.einsum("ti,to->io", x, out, preferred_element_type=dtype).T
    return jnp.einsum("to,ti->oi", out, x, preferred_element_type=dtype)


product.defvjp(_forward, _backward)

#: Of x, up to which a CPU multiplies W x^T in place of x W^T. The time is that of reading W, which XLA's product there
#: reads faster as its left factor: [8, 384] and a W of [16384, 384], [3072, 384] and [384, 1536] took .76, .73 and .65
#: of the time (2 cores of an AMD EPYC, float32); from about 64 rows on there is nothing to gain.
FEW_ROWS = 64


def product_of_few(
    x: Float[Array, "*batch size_in"], weight: Float[Array, "size_out size_in"], dtype: jnp.dtype
) -> Float[Array, "*batch size_out"]:
    """x W^T in `dtype` as decoding makes it: of few rows, and without a rule for gradients."""
    if math.prod(x.shape[:-1]) > FEW_ROWS or jax.devices()[0].platform != "cpu":
        return jnp.einsum("...i,oi->...o", x, weight, preferred_element_type=dtype)
    turned = jnp.einsum("oi,mi->om", weight, x.reshape(-1, x.shape[-1]), preferred_element_type=dtype)
    # Without the barrier XLA would see through the transposition, and multiply x W^T.
    return jax.lax.optimization_barrier(turned).T.reshape(*x.shape[:-1], -1)


def _plain_contract(left: Array, right: Array, names: str) -> Array:
    return jnp.einsum(names, left, right, preferred_element_type=wide(left.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(left: Array, right: Array, names: str) -> Array:
    """`jnp.einsum` of two activations of one dtype, in float32 (`wide`).

    Cotangents are rounded to the factors' dtype, as in fused attention kernels: left to JAX, those of bfloat16 factors
    are multiplied at the rate of float32.
    """
    return _plain_contract(left, right, names)


def _contract_forward(left: Array, right: Array, names: str) -> tuple[Array, tuple[Array, Array]]:
    return _plain_contract(left, right, names), (left, right)


def _contract_backward(names: str, kept: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    left, right = kept
    return jax.vjp(lambda left, right: jnp.einsum(names, left, right), left, right)[1](out.astype(left.dtype))


contract.defvjp(_contract_forward, _contract_backward)
