"""Batches and parameters without values: what the compiled programs of a workload take as arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding, SingleDeviceSharding

from vlmalign.mesh import batch_sharding, replicated
from vlmalign.models.lora import is_adapter
from vlmalign.models.model import Model
from vlmalign.planning.target import Target
from vlmalign.planning.workload import Update
from vlmalign.types import GroupBatch, Layout

Shapes = Mapping[str, jax.ShapeDtypeStruct]


class Where(NamedTuple):
    """Shardings on a target: a copy on every device, rows shared out, and its first device alone."""

    whole: Sharding
    rows: Sharding
    one: Sharding


def places(target: Target) -> Where:
    one = SingleDeviceSharding(target.devices[0])
    mesh = target.mesh
    return Where(one, one, one) if mesh is None else Where(replicated(mesh), batch_sharding(mesh), one)


def put(tree: Any, sharding: Sharding) -> Any:
    """The same shapes, placed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


class Parameters(NamedTuple):
    """As the studies divide them: an adapter is trained, in float32, on a base that is frozen."""

    frozen: Shapes
    trained: Shapes


def split(model: Model) -> Parameters:
    """The parameters of a model. Kept: finding the shapes of a large model takes seconds."""
    return _split(replace(model, remat="none"))


@cache
def _split(model: Model) -> Parameters:
    shapes = model.shapes
    return Parameters(
        {name: value for name, value in shapes.items() if not is_adapter(name)},
        {name: jax.ShapeDtypeStruct(value.shape, jnp.float32) for name, value in shapes.items() if is_adapter(name)},
    )


@cache
def base_of(model: Model) -> Model:
    """The model without its adapter: one and the same for equal models, since it keeps what it has found out."""
    return replace(model.without_lora(), remat="none")


def size(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def prompt_batch(model: Model, *, rows: int, prompt: int) -> GroupBatch:
    """Prompts that wait for their rollout, each with one image."""
    return _batch(model, Layout(prompt, 0, 0), rows)


def update_batch(model: Model, update: Update) -> tuple[GroupBatch, dict[str, jax.ShapeDtypeStruct]]:
    """A micro-batch of this stage, and what is recorded about its tokens."""
    _, group, completion = update.layout
    batch = _batch(model, update.layout, update.rows)
    if update.recorded:
        batch = batch._replace(
            advantage=_array((update.rows, group), jnp.float32),
            truncated=_array((update.rows, group), jnp.bool_),
        )
    values = _array((update.rows, group, completion), jnp.float32)
    return batch, dict.fromkeys(update.recorded, values)


def counts(model: Model, update: Update) -> dict[str, jax.ShapeDtypeStruct]:
    """The normalisers that the objective asks for, as float32 scalars: their names are found by counting ones."""
    batch, _ = update_batch(model, update)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), batch._replace(features=None))
    return dict.fromkeys(update.objective.counts([ones]), _array((), jnp.float32))


def _batch(model: Model, layout: Layout, rows: int) -> GroupBatch:
    config = model.config.decoder
    axes = (config.position_axes,) if config.position_axes > 1 else ()
    per_token = _array((rows, layout.row), jnp.int32)
    vision = model.config.vision
    features = None if vision is None else _array((rows * vision.tokens, config.embed), jnp.dtype(model.dtype))
    return GroupBatch(
        tokens=per_token,
        segment=per_token,
        order=per_token,
        position=_array((rows, layout.row, *axes), jnp.int32),
        image=per_token,
        block=per_token,
        weight=_array((rows, layout.group, layout.completion), jnp.float32),
        group_id=_array((rows,), jnp.int32),
        features=features,
    )


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
