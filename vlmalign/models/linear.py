"""Linear maps with weights as checkpoints store them, [out, in], and the slots a low-rank adapter fills."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlmalign.models.dropout import Noise, drop
from vlmalign.models.initial import Rngs, Value, init_constant, init_normal
from vlmalign.models.product import product, product_of_few
from vlmalign.shapes import Array, Float

#: what rematerialisation calls the result of a linear map
PRODUCT = "product"


def is_projection(name: str) -> bool:
    """Whether the parameter is a matrix of the decoder that `Linear` multiplies by: it may come in float32, is used in
    the activations' dtype, and then gets a float32 gradient."""
    return name.startswith("language_model.layers.") and name.endswith("_proj.weight")


class Matrix(nnx.Module):
    """A bare `weight`, so that an adapter's path reads `q_proj.lora_A.weight` as in a PEFT file."""

    def __init__(self, weight: Value, dims: tuple[str, ...]):
        self.weight = nnx.Param(weight, dims=dims)


class Linear(nnx.Module):
    """y = x W^T (+ b), with W [out, in]; adapted by A [rank, in] and B [out, rank], and for DoRA by m [out].

    LoRA (Hu et al., arXiv 2106.09685, eq. 3): x W^T + s (x A^T) B^T, s = alpha / rank, or alpha / sqrt(rank) for
    rsLoRA (arXiv 2312.03732). DoRA (arXiv 2402.09353, eq. 5 and 11): that, times m / |W + s B A| for each output, the
    norm over inputs held constant in the gradient.
    """

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        dims: tuple[str, str],
        dtype: jnp.dtype,
        rngs: Rngs,
        bias: bool = False,
        std: float | None = None,
    ):
        scale = size_in**-0.5 if std is None else std
        self.weight = nnx.Param(init_normal(rngs, (size_out, size_in), scale, dtype), dims=dims)
        self.bias = nnx.data(nnx.Param(init_constant(rngs, (size_out,), 0.0, dtype), dims=dims[:1]) if bias else None)
        # Declared as data although empty: an attribute first set to None would be static, and could not hold weights.
        self.lora_A = nnx.data(None)
        self.lora_B = nnx.data(None)
        self.lora_magnitude_vector = nnx.data(None)
        self.lora_scale = 0.0
        self.lora_path = ""
        self.decoding = False  #: multiplies as `product_of_few` does

    def add_lora(self, *, path: str, rank: int, scale: float, magnitude: bool, dtype: jnp.dtype) -> None:
        """Fill the adapter slots with shapes; first values come from `lora.init_adapter`. `path`, within the decoder's
        layer, names the mask."""
        size_out, size_in = self.weight.shape
        dim_out, dim_in = self.weight.get_metadata()["dims"]
        self.lora_A = Matrix(jax.ShapeDtypeStruct((rank, size_in), dtype), ("rank", dim_in))
        self.lora_B = Matrix(jax.ShapeDtypeStruct((size_out, rank), dtype), (dim_out, "rank"))
        if magnitude:
            self.lora_magnitude_vector = nnx.Param(jax.ShapeDtypeStruct((size_out,), dtype), dims=(dim_out,))
        self.lora_scale, self.lora_path = scale, path

    def __call__(
        self, x: Float[Array, "*batch size_in"], noise: Noise | None = None
    ) -> Float[Array, "*batch size_out"]:
        """With `noise`, the adapter (not the frozen matrix) sees x with some of its numbers dropped."""
        multiply = product_of_few if self.decoding else product
        y = multiply(x, self.weight[...], x.dtype)
        if self.lora_A is not None:
            # The adapter is float32 while the base may be bfloat16: it is used in the dtype of x.
            seen = x if noise is None else drop(x, noise, self.lora_path)
            low = product(seen, self.lora_A.weight[...], x.dtype)
            y = y + self.lora_scale * product(low, self.lora_B.weight[...], x.dtype)
            if self.lora_magnitude_vector is not None:
                norm = output_norms(self.weight[...], self.lora_A.weight[...], self.lora_B.weight[...], self.lora_scale)
                y = y * (self.lora_magnitude_vector[...] / jax.lax.stop_gradient(norm)).astype(x.dtype)
        return checkpoint_name(y if self.bias is None else y + self.bias[...], PRODUCT)


def joined_product(
    x: Float[Array, "*batch size_in"], matrix: Float[Array, "sum_out size_in"], parts: Sequence[Linear]
) -> tuple[Array, ...]:
    """What each of `parts` makes of x in decoding, in one product; `matrix` are their matrices, one below the other."""
    y = product_of_few(x, matrix, x.dtype)
    ends = list(accumulate(part.weight.shape[0] for part in parts))
    each = jnp.split(y, ends[:-1], axis=-1)
    return tuple(y if part.bias is None else y + part.bias[...] for y, part in zip(each, parts, strict=True))


def output_norms(
    weight: Float[Array, "out in"], a: Float[Array, "rank in"], b: Float[Array, "out rank"], scale: float
) -> Float[Array, "out"]:
    """|W + scale B A| of each output, in float32.

    Expanded, so that no matrix of the size of W is made: |w|^2 + 2 s b (A w) + s^2 b (A A^T) b^T.
    """
    wide = weight.astype(jnp.float32)
    cross = jnp.einsum("or,or->o", b, jnp.einsum("oi,ri->or", wide, a))
    square = jnp.einsum("or,rq,oq->o", b, jnp.einsum("ri,qi->rq", a, a), b)
    return jnp.sqrt(jnp.sum(wide * wide, axis=1) + 2 * scale * cross + scale**2 * square)
