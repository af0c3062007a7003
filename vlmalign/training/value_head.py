"""PPO's value head: one number per token, a linear function of the policy's own states, trained with the adapter."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlmalign.models.model import Params
from vlmalign.shapes import Array, Float

WEIGHT, BIAS = "value_head.weight", "value_head.bias"


def init_value_head(embed: int) -> dict[str, Array]:
    """Zeros: every value starts at 0, so that the first advantages come from the rewards alone."""
    return {WEIGHT: jnp.zeros((embed,), jnp.float32), BIAS: jnp.zeros((), jnp.float32)}


def split_value_head(params: Params) -> tuple[dict[str, Array], dict[str, Array]]:
    """The model's parameters, and the head's (empty without one)."""
    head = {name: params[name] for name in (WEIGHT, BIAS) if name in params}
    return {name: value for name, value in params.items() if name not in head}, head


def token_values(states: Float[Array, "*batch embed"], head: Params) -> Float[Array, "*batch"]:
    """The value before each continuation token, from the state that predicts it; float32."""
    wide = states.astype(jnp.float32)
    # Values are compared with returns, which are exact: no product of lower precision, as accelerators use by default.
    return jnp.einsum("...d,d->...", wide, head[WEIGHT], precision=jax.lax.Precision.HIGHEST) + head[BIAS]
