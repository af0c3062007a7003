"""The decoder's state after a prompt: that from which the first token of an answer is predicted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmalign.data.groups import round_up
from vlmalign.evaluation.scoring import plan
from vlmalign.mesh import on_mesh, put_batch, row_shares
from vlmalign.models.model import Model, Params
from vlmalign.rollout.engine import prefill
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.shapes import Array, Float
from vlmalign.types import Group, GroupBatch


def prompt_states(
    model: Model,
    params: Params,
    prompts: Sequence[Group],
    *,
    features: FeatureStore | None,
    budget: int = 8192,
    mesh: Mesh | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Float[np.ndarray, "prompt embed"]:
    """The state after each prompt, behind the last layer and its norm; `prompts` hold no continuations and at least one
    is there.

    At most `budget` tokens run at once (a longer prompt runs alone); with a `mesh`, on which `params` live, its devices
    share them out. `advance(n)` is called as n more are done.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(prompts)
    for batch in plan([replace(group, id=number) for number, group in enumerate(prompts)], budget=budget):
        rows = round_up(batch.rows, row_shares(mesh))
        images = rows * max(len(group.images) for group in batch.groups)
        arrays = assemble(batch.groups, batch.layout, rows=rows, images=images, features=features)
        states = jax.device_get(on_mesh(_last, mesh)(model, params, put_batch(arrays, mesh)))
        for row, group in enumerate(batch.groups):
            found[group.id] = states[row]
        advance(len(batch.groups))
    return np.stack(found)


@partial(jax.jit, static_argnames="model")
def _last(model: Model, params: Params, batch: GroupBatch) -> Float[Array, "n embed"]:
    return prefill(model, params, batch).last.astype(jnp.float32)
