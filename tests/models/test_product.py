"""Products and gates with backward passes of their own: the same as autodiff's in float32, better than it in bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import assert_close

from vlmalign.models.decoder import ACTIVATIONS, gated
from vlmalign.models.product import contract, product

RNG = np.random.default_rng(0)
FLOAT = jnp.dtype("float32")


def numbers(*shape: int, dtype: str = "float32") -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), dtype)


def test_float32_is_what_autodiff_makes():
    x, w, slope = numbers(2, 3, 7), numbers(5, 7), numbers(2, 3, 5)
    found = jax.vjp(lambda x, w: product(x, w, FLOAT), x, w)
    plain = jax.vjp(lambda x, w: jnp.einsum("bti,oi->bto", x, w), x, w)
    assert_close(found[0], plain[0], 1e-6)
    for ours, theirs in zip(found[1](slope), plain[1](slope), strict=True):
        assert_close(ours, theirs, 1e-6)


def test_a_float32_matrix_gets_a_gradient_that_was_never_rounded():
    """Over 4,096 tokens. Rounded to bfloat16, it would be off by up to 2^-9 of itself."""
    x, w, slope = numbers(4096, 8, dtype="bfloat16"), numbers(4, 8), numbers(4096, 4, dtype="bfloat16")
    out, pull = jax.vjp(lambda x, w: product(x, w, x.dtype), x, w)
    d_x, d_w = pull(slope)
    assert (out.dtype, d_x.dtype, d_w.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    exact = np.asarray(slope, np.float64).T @ np.asarray(x, np.float64)
    assert_close(d_w, exact, 1e-5)
    assert np.max(np.abs(exact - np.asarray(jnp.asarray(exact, jnp.bfloat16), np.float64))) > 1e-4 * np.abs(exact).max()
    # Used rounded, as everything that multiplies activations.
    assert jnp.array_equal(out, jnp.einsum("ti,oi->to", x, w.astype(jnp.bfloat16)))


def test_float32_results_of_bfloat16_factors_need_no_float32_copy_of_them():
    """A head of 96 x 64: forward and backward hold no float32 array of its size."""
    x, head = numbers(8, 64, dtype="bfloat16"), numbers(96, 64, dtype="bfloat16")

    def loss(x: jax.Array) -> jax.Array:
        z = product(x, head, FLOAT)
        assert z.dtype == jnp.float32
        return jnp.sum(jax.nn.logsumexp(z, axis=-1))

    text = jax.jit(jax.grad(loss)).lower(x).as_text()
    assert "96x64xbf16" in text
    assert "96x64xf32" not in text


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gates_are_what_autodiff_makes(kind):
    gate, up, slope = numbers(3, 50), numbers(3, 50), numbers(3, 50)
    found = jax.vjp(lambda g, u: gated(g, u, kind), gate, up)
    plain = jax.vjp(lambda g, u: ACTIVATIONS[kind](g) * u, gate, up)
    assert_close(found[0], plain[0], 0)
    for ours, theirs in zip(found[1](slope), plain[1](slope), strict=True):
        assert_close(ours, theirs, 1e-6)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_gates_in_bfloat16_are_rounded_once(kind):
    gate, up, slope = (numbers(2000, dtype="bfloat16") for _ in range(3))
    wide = [np.asarray(x, np.float32) for x in (gate, up, slope)]
    exact = jax.vjp(lambda g, u: ACTIVATIONS[kind](g) * u, *map(jnp.asarray, wide[:2]))[1](jnp.asarray(wide[2]))
    found = jax.vjp(lambda g, u: gated(g, u, kind), gate, up)[1](slope)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert jnp.array_equal(ours, theirs.astype(jnp.bfloat16))


def test_activations_of_bfloat16_are_contracted_in_bfloat16_both_ways():
    names = "ntgh,nsgh->ngts"
    left, right = numbers(2, 5, 3, 8), numbers(2, 7, 3, 8)
    slope = numbers(2, 3, 5, 7)
    found = jax.vjp(lambda a, b: contract(a, b, names), left, right)
    plain = jax.vjp(lambda a, b: jnp.einsum(names, a, b), left, right)
    assert_close(found[0], plain[0], 1e-6)
    for ours, theirs in zip(found[1](slope), plain[1](slope), strict=True):
        assert_close(ours, theirs, 1e-6)
    low = [x.astype(jnp.bfloat16) for x in (left, right)]
    out, pull = jax.vjp(lambda a, b: contract(a, b, names), *low)
    assert out.dtype == jnp.float32
    # Sums are of the rounded factors, and not rounded themselves.
    assert_close(out, jnp.einsum(names, *(x.astype(jnp.float32) for x in low)), 1e-6)
    text = jax.jit(pull).lower(slope).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 2
    assert not any("f32" in line.split(":")[-1] for line in products)
