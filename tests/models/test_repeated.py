"""Layers of a kind are traced once, however many there are, and shapes are known without tracing anything."""

from dataclasses import replace
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_checkpoints import group, put, text, vlm

from vlmalign.models import model as module
from vlmalign.models.initial import Rngs, init_constant, init_normal
from vlmalign.models.repeated import each_kind_once
from vlmalign.types import Layout


class Scale(nnx.Module):
    """Two kinds: with a power of one, and of two."""

    def __init__(self, factor: float, power: int):
        self.factor, self.power = nnx.Param(jnp.float32(factor)), power

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.factor[...] * x**self.power


def test_a_kind_is_traced_once_and_every_module_keeps_its_own_parameters():
    traced = []

    def chain(factors: jax.Array, x: jax.Array) -> jax.Array:
        @each_kind_once
        def run(each: Scale, x: jax.Array) -> jax.Array:
            traced.append(each.power)
            return each(x) + factors[0]  # closed over: the same for all

        for factor, power in zip(factors, (1, 2, 1, 2, 1), strict=True):
            x = run(Scale(factor, power), x)
        return x

    def plain(factors: jax.Array, x: jax.Array) -> jax.Array:
        for factor, power in zip(factors, (1, 2, 1, 2, 1), strict=True):
            x = factor * x**power + factors[0]
        return x

    factors, x = jnp.array([0.5, -0.7, 0.9, 1.1, -1.3]), jnp.float32(0.3)
    found = jax.jit(jax.value_and_grad(chain, argnums=(0, 1)))(factors, x)
    assert traced == [1, 2]
    expected = jax.value_and_grad(plain, argnums=(0, 1))(factors, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.full
def test_a_deeper_decoder_takes_no_more_tracing():
    """Attention is traced once for layers with a window and once for those without, forward and backward together."""
    model = text().model
    batch = put([group(0, [5, 6, 7], [8, 9], [10])], Layout(4, 2, 2), images=None)

    def attended(count: int) -> int:
        layers = model.config.decoder.layers[:2] * count
        deep = replace(model, config=replace(model.config, decoder=replace(model.config.decoder, layers=layers)))
        own = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in deep.shapes.items()}
        with patch.object(module, "group_attention", wraps=module.group_attention) as attention:
            jax.make_jaxpr(jax.grad(lambda params, batch: deep.hidden(params, batch).sum()))(own, batch)
        return attention.call_count

    assert attended(1) == attended(4) == 2


@pytest.mark.full
def test_shapes_are_those_of_drawn_parameters_and_nothing_is_traced_for_them():
    for checkpoint in (text(), vlm()):
        model = replace(checkpoint.model)  # a new one: nothing is remembered
        with patch.object(jax, "eval_shape", side_effect=AssertionError("traced")):
            shapes = {name: (value.shape, value.dtype) for name, value in model.shapes.items()}
        drawn = model.init(jax.random.key(0))
        assert shapes == {name: (value.shape, value.dtype) for name, value in drawn.items()}
        assert all(np.isfinite(np.asarray(value)).all() for value in drawn.values())


def test_first_values():
    rngs: Rngs = nnx.Rngs(0)
    drawn = np.asarray(init_normal(rngs, (200, 300), 0.02, jnp.dtype("float32")))
    # The mean of 60,000 such numbers strays by 8e-5, their spread by 6e-5.
    assert abs(drawn.mean()) < 4e-4
    assert abs(drawn.std() - 0.02) < 3e-4
    assert np.array_equal(init_constant(rngs, (3,), 0.5, jnp.dtype("float32")), [0.5, 0.5, 0.5])
    assert init_normal(None, (2, 3), 1.0, jnp.dtype("bfloat16")) == jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)
