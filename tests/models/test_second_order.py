"""Gradients can be differentiated forwards: Hessian-vector products through a whole model with images and adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import adapted, group, put, token_scores

from vlmalign.types import Layout

GROUPS = (
    group(10, [2, 5, "a", 8, 9], [11, 12, 13, 14], [20, 21]),
    group(11, [2, 7, 30, 31], [33, 34], ["b", 36, 37, 38]),
)
BATCH = put(GROUPS, Layout(12, 2, 9))
WEIGHT = np.random.default_rng(0).normal(size=(2, 2, 9))


def hessian_product(trained: str, change: float) -> tuple[dict, dict, dict]:
    """The product of the loss's Hessian over the adapter, or over everything, with a random direction; and by central
    differences of the gradient."""
    with jax.enable_x64(True):
        params = {name: jnp.asarray(np.asarray(value), jnp.float64) for name, value in adapted().params.items()}
        own = {name: value for name, value in params.items() if trained in name}
        frozen = {name: value for name, value in params.items() if name not in own}
        rng = np.random.default_rng(1)
        direction = {name: jnp.asarray(rng.normal(size=value.shape)) for name, value in own.items()}
        weight = jnp.asarray(WEIGHT) * (BATCH.weight > 0)

        def loss(own, batch):
            found = token_scores(adapted().model, {**frozen, **own}, batch, 1.0)
            return jnp.sum(weight * found.logp) + 0.1 * jnp.sum(weight * found.entropy)

        def moved(sign: float) -> dict:
            return {name: value + sign * change * direction[name] for name, value in own.items()}

        slope = jax.jit(jax.grad(loss))
        product = jax.jit(lambda own, batch: jax.jvp(lambda x: jax.grad(loss)(x, batch), (own,), (direction,))[1])(
            own, BATCH
        )
        up, down = slope(moved(1.0), BATCH), slope(moved(-1.0), BATCH)
        differences = {name: (up[name] - down[name]) / (2 * change) for name in own}
        return product, differences, slope(own, BATCH)


@pytest.mark.full
@pytest.mark.parametrize("trained", ["lora_", ""])
def test_a_product_with_the_hessian_is_the_change_of_the_gradient(trained):
    product, differences, slope = hessian_product(trained, 1e-5)
    largest = max(float(np.abs(value).max()) for value in product.values())
    assert largest > 1e-2
    assert all(value.dtype == np.float64 for value in product.values())
    assert any(np.abs(value).max() > 0 for value in slope.values())
    for name, value in product.items():
        assert np.abs(np.asarray(value) - np.asarray(differences[name])).max() < 1e-6 * largest, name
