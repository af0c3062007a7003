"""The programs that a run calls, made of the very functions that it calls, with shapes in place of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.mesh import placement
from vlmalign.models.model import Model
from vlmalign.planning.batches import Where, base_of, counts, prompt_batch, put, size, split, update_batch
from vlmalign.planning.target import Target, tracing
from vlmalign.planning.workload import CHUNK, Sampled, Update
from vlmalign.rollout import decode_weights as turned
from vlmalign.rollout.cache import empty_program
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.engine import Rows, decode, prefill
from vlmalign.training.policy import merged_policy
from vlmalign.training.step import Trainer, TrainState
from vlmalign.types import GroupBatch


class Job(NamedTuple):
    """A program to be compiled: a function compiled anew, so that nothing traced for another device is found again."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    alone: bool = False  #: runs on one device, whatever the mesh


def encode_job(model: Model, where: Where) -> Job:
    """The tower over `CHUNK` images."""
    base, vision = base_of(model), model.config.vision
    pixels = jax.ShapeDtypeStruct((CHUNK, vision.channels, vision.image_size, vision.image_size), jnp.float32)
    return Job("encode", base.encode, (put(split(base).frozen, where.one), put(pixels, where.one)), alone=True)


def merge_job(model: Model, where: Where) -> Job:
    """The adapter into a copy of the weights, for a rollout."""
    frozen, trained = split(model)
    return Job(
        "merge",
        lambda base, adapter: merged_policy(model, base, adapter),
        (put(frozen, where.whole), put(trained, where.whole)),
    )


def generator(model: Model, sampled: Sampled, target: Target) -> Generator:
    """How the study samples, from which follow the shapes of its programs."""
    return Generator(
        model=base_of(model),
        features=None,
        stop_ids=(),
        rows=sampled.rows,
        group=sampled.group,
        completion=sampled.completion,
        sampling=sampled.sampling,
        mesh=target.mesh if target.devices else None,
    )


def rollout_jobs(name: str, model: Model, sampled: Sampled, where: Where, target: Target) -> list[Job]:
    """Prefill, and a block of decoding with the largest caches."""
    base, made = base_of(model), generator(model, sampled, target)
    shape = max(made.shapes, key=lambda s: s.rows * s.group * s.length)
    with tracing(target):
        cache, shared = jax.eval_shape(lambda: empty_program(base, shape=shape, prompt=sampled.prompt))
    n, k = shape[:2]
    per_row = jax.ShapeDtypeStruct((n,), jnp.int32)
    rows = Rows(per_row, per_row, per_row, jax.ShapeDtypeStruct((n, k), jnp.int32), per_row)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = prompt_batch(base, rows=made.prefilled_at_once, prompt=sampled.prompt)
    weights = _decode_weights(base, target)
    return [
        Job(
            f"{name} prefill",
            lambda params, batch: prefill(base, params, batch),
            (put(split(base).frozen, where.whole), _put_batch(batch, where)),
        ),
        Job(
            f"{name} decode",
            lambda params, cache, shared, rows, key: decode(
                base, params, cache, shared, rows, key, steps=made.steps, sampling=sampled.sampling
            ),
            (
                put(weights, where.whole),
                put(cache, where.rows),
                put(shared, where.rows),
                put(rows, where.rows),
                put(key, where.whole),
            ),
            donated=(1,),
        ),
    ]


def _decode_weights(base: Model, target: Target) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `rollout.decode_weights` makes of the parameters on this target."""
    shapes, names = split(base).frozen, turned_names(base, target)
    found = {n: v for n, v in shapes.items() if n not in names or turned._is_embedding(n)}
    return found | {n + turned.TURNED: jax.ShapeDtypeStruct(shapes[n].shape[::-1], shapes[n].dtype) for n in names}


def turned_names(base: Model, target: Target) -> set[str]:
    """The matrices that decoding holds a second time, in another order: some on a CPU, none on a GPU."""
    if target.count > 1 or not target.devices or target.devices[0].platform != "cpu":
        return set()
    shapes = split(base).frozen
    names = {name for name in shapes if turned._is_turned(base, name)}
    return names if size({name: shapes[name] for name in names}) <= turned.MOST_BYTES else set()


def trainer(model: Model, update: Update, target: Target) -> Trainer:
    """The stage's own trainer. Parameters of the reference are arguments of its programs: none are needed here."""
    mesh = target.mesh
    return Trainer(
        model,
        update.objective,
        update.optimiser,
        reference=(model, {}) if update.objective.needs_reference else None,
        placement=None if mesh is None else placement(mesh, model.shapes, model.dims),
    )


def micro_job(model: Model, update: Update, where: Where, target: Target) -> Job:
    """Gradients of one micro-batch, added to those before."""
    frozen, trained = (put(part, where.whole) for part in split(model))
    batch, recorded = update_batch(model, update)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return Job(
        f"{update.name} gradients",
        trainer(model, update, target)._micro,
        (
            trained,
            trained,
            frozen,
            _put_batch(batch, where),
            put(recorded, where.rows),
            put(counts(model, update), where.whole),
            put(step, where.whole),
        ),
        donated=(0,),
    )


def apply_job(model: Model, update: Update, where: Where, target: Target) -> Job:
    """The optimiser's step."""
    trained = split(model).trained
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(dict(trained), jax.eval_shape(update.optimiser.init, trained), scalar)
    loss = jax.ShapeDtypeStruct((), jnp.float32)
    return Job(
        f"{update.name} optimiser",
        trainer(model, update, target)._update,
        (put(state, where.whole), put(dict(trained), where.whole), put(loss, where.whole)),
        donated=(0,),
    )


def reference_job(model: Model, update: Update, where: Where, target: Target) -> Job:
    """Log-probabilities of a micro-batch under the reference, which is an adapter of its own."""
    frozen, trained = (put(part, where.whole) for part in split(model))
    extra = {name: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=where.whole) for name, v in trained.items()}
    return Job(
        f"{update.name} reference",
        trainer(model, update, target)._reference_scores,
        (frozen, extra, _put_batch(update_batch(model, update)[0], where)),
    )


def _put_batch(batch: GroupBatch, where: Where) -> GroupBatch:
    """As `mesh.put_batch`: by rows, features whole."""
    placed = put(batch._replace(features=None), where.rows)
    return placed._replace(features=None if batch.features is None else put(batch.features, where.whole))
