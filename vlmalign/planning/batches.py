"""Batches and parameters without values: what the compiled programs of a workload take as arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, Sharding, SingleDeviceSharding

from vlmalign.mesh import Placement, batch_sharding, replicated
from vlmalign.models.lora import is_adapter
from vlmalign.models.model import Model
from vlmalign.models.network import DECODER
from vlmalign.planning.target import Target
from vlmalign.planning.workload import Update
from vlmalign.rollout.placing import rollout_placement, training_placement
from vlmalign.training.value_head import init_value_head
from vlmalign.types import GroupBatch, Layout

Shapes = Mapping[str, jax.ShapeDtypeStruct]


class Where(NamedTuple):
    """Shardings on a target; None for one device that nothing is compiled for."""

    whole: Sharding | None  #: a copy on every device
    rows: Sharding | None  #: rows shared out
    one: Sharding | None  #: the first device alone
    training: Placement | None = None  #: of parameters; None: on one device
    sampling: Placement | None = None  #: of the policy in rollouts

    def trained(self, shapes: Shapes) -> Shapes:
        """Parameters where training has them."""
        return self._placed(shapes, self.training)

    def sampled(self, shapes: Shapes) -> Shapes:
        """Parameters where rollouts have them."""
        return self._placed(shapes, self.sampling)

    def _placed(self, shapes: Shapes, placement: Placement | None) -> Shapes:
        if placement is None:
            return put(dict(shapes), self.one)
        return {name: put(value, placement(name)) for name, value in shapes.items()}


def places(target: Target, model: Model) -> Where:
    one = SingleDeviceSharding(target.devices[0]) if target.devices else None
    if target.mesh is None:
        return Where(one, one, one)
    training, sampling = _placements(replace(model, remat="none"), target.mesh, target.sampling_mesh)
    return Where(replicated(target.mesh), batch_sharding(target.mesh), one, training, sampling)


def rollout_places(where: Where) -> Where:
    """The same devices as rollouts stand on: batches and caches lie on the mesh of the policy."""
    if where.sampling is None:
        return where
    mesh = where.sampling.mesh
    return where._replace(whole=replicated(mesh), rows=batch_sharding(mesh))


@cache
def _placements(
    model: Model, training: Mesh | AbstractMesh, sampling: Mesh | AbstractMesh
) -> tuple[Placement, Placement]:
    return training_placement(model, training), rollout_placement(model, sampling)


def put(tree: Any, sharding: Sharding | None) -> Any:
    """The same shapes, placed."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


class Parameters(NamedTuple):
    """As the studies divide them: what is trained is float32, and the base or the tower is frozen."""

    frozen: Shapes
    trained: Shapes


def _kept(find: Callable[[Model], Any]) -> Callable[[Model], Any]:
    """What `find` found of a model, whatever it rematerialises: the shapes of a large model take seconds."""
    kept = cache(find)
    return wraps(find)(lambda model: kept(replace(model, remat="none")))


@_kept
def split(model: Model) -> Parameters:
    """The parameters of a model."""
    shapes = model.shapes
    trained = {name for name in shapes if (is_adapter(name) if model.lora is not None else name.startswith(DECODER))}
    return Parameters(
        {name: value for name, value in shapes.items() if name not in trained},
        {name: jax.ShapeDtypeStruct(shapes[name].shape, jnp.float32) for name in shapes if name in trained},
    )


def trained_in(model: Model, update: Update) -> Shapes:
    """What this stage trains: PPO, a value head beside the policy."""
    found = split(model).trained
    if not update.objective.needs_values:
        return found
    head = jax.eval_shape(partial(init_value_head, model.config.decoder.embed))
    return dict(found) | head


@_kept
def used(model: Model) -> Shapes:
    """What is trained, in the dtypes in which the model uses it."""
    return {name: model.shapes[name] for name in split(model).trained}


@_kept
def whole(model: Model) -> Shapes:
    """All parameters without the adapter, as checkpoints and rollouts have them."""
    return base_of(model).shapes


@_kept
def base_of(model: Model) -> Model:
    """The model without its adapter: one and the same for equal models, since it keeps what it has found out."""
    return model.without_lora()


def size(tree: Any) -> int:
    """Bytes of all arrays on one device: of those that are placed, its share."""
    shares = ((x, x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(tree))
    return sum(math.prod(shape) * x.dtype.itemsize for x, shape in shares)


def prompt_batch(model: Model, *, rows: int, prompt: int, images: int) -> GroupBatch:
    """Prompts that wait for their rollout, each with so many soft tokens of images."""
    return _batch(model, Layout(prompt, 0, 0), rows, images)


def update_batch(model: Model, update: Update) -> tuple[GroupBatch, dict[str, jax.ShapeDtypeStruct]]:
    """A micro-batch of this stage, and what is recorded about its tokens."""
    _, group, completion = update.layout
    batch = _batch(model, update.layout, update.rows, update.lengths.images)
    if update.recorded:
        batch = batch._replace(
            advantage=_array((update.rows, group), jnp.float32), truncated=_array((update.rows, group), jnp.bool_)
        )
    values = _array((update.rows, group, completion), jnp.float32)
    return batch, dict.fromkeys(update.recorded, values)


def counts(model: Model, update: Update) -> dict[str, jax.ShapeDtypeStruct]:
    """The normalisers that the objective asks for, as float32 scalars: their names are found by counting ones."""
    batch, _ = update_batch(model, update)
    ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), batch._replace(features=None))
    return dict.fromkeys(update.objective.counts([ones]), _array((), jnp.float32))


def _batch(model: Model, layout: Layout, rows: int, images: int) -> GroupBatch:
    config = model.config.decoder
    axes = (config.position_axes,) if config.position_axes > 1 else ()
    per_token = _array((rows, layout.row), jnp.int32)
    vision = model.config.vision
    features = None
    if vision is not None:
        # A batch has room for an image in each row, also where no row has one.
        features = _array((rows * max(images, vision.tokens or 1), config.embed), jnp.dtype(model.dtype))
    return GroupBatch(
        **dict.fromkeys(("tokens", "segment", "order", "image", "block"), per_token),
        position=_array((rows, layout.row, *axes), jnp.int32),
        weight=_array((rows, layout.group, layout.completion), jnp.float32),
        group_id=_array((rows,), jnp.int32),
        features=features,
    )


def _array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)
