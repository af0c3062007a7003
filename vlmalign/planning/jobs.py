"""The programs that a run calls, made of the very functions that it calls, with shapes in place of arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlmalign.mesh import ROWS, TENSOR
from vlmalign.models.compiling import DECODING
from vlmalign.models.model import Model
from vlmalign.planning.batches import (
    Where,
    base_of,
    counts,
    places,
    prompt_batch,
    put,
    rollout_places,
    split,
    trained_in,
    update_batch,
    used,
    whole,
)
from vlmalign.planning.target import Target, tracing
from vlmalign.planning.workload import CHUNK, Sampled, Update
from vlmalign.rollout.cache import decode_block, empty_program
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.decode_weights import joined, joins_here, with_made
from vlmalign.rollout.engine import Rows, prefill
from vlmalign.training.merged import changed_parameters
from vlmalign.training.step import Trainer, TrainState
from vlmalign.types import GroupBatch


class Job(NamedTuple):
    """A program to be compiled: a function compiled anew, so that nothing traced for another device is found again."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...] = ()
    options: Mapping[str, Any] = {}  #: for the compiler, beside the target's
    counted: bool = False  #: how its loop is launched is read off as well
    mesh: Mesh | None = None  #: in force while it is traced; None: it runs on one device, or on its arguments' own


#: how a program is made for a model of any depth
Make = Callable[[Model], Job]


def made_by(job: Callable[[Model, Update, Where, Target], Job], update: Update, target: Target) -> Make:
    """A program of a stage, for a model that need not be the workload's own."""
    return lambda model: job(model, update, places(target, model), target)


def encode_job(model: Model, where: Where) -> Job:
    """The tower over `CHUNK` images."""
    base, vision = base_of(model), model.config.vision
    pixels = jax.ShapeDtypeStruct((CHUNK, vision.channels, vision.image_size, vision.image_size), jnp.float32)
    return Job("encode", base.encode, (put(whole(base), where.one), put(pixels, where.one)))


def merge_job(model: Model, where: Where, target: Target) -> Job:
    """The trained parameters into a policy to sample from: the matrices that change, made anew."""
    frozen, trained = split(model)

    changed = partial(changed_parameters, model, join=joins_here(target.mesh, target.sampling_mesh))
    return Job("merge", changed, (where.trained(frozen), where.trained(trained)), mesh=target.mesh)


def changed_names(model: Model) -> set[str]:
    """The parameters of the policy that are not the base's own."""
    trained = split(model).trained
    if model.lora is None:
        return set(trained)
    return {name.replace(".lora_A.", ".") for name in trained if ".lora_A." in name}


def generator(model: Model, sampled: Sampled, target: Target) -> Generator:
    """How the study samples, from which follow the shapes of its programs."""
    mesh, sizes = target.sampling_mesh if target.devices else None, (sampled.rows, sampled.group, sampled.completion)
    return Generator(base_of(model), None, (), *sizes, sampled.sampling, mesh=mesh)


def rollout_jobs(model: Model, sampled: Sampled, where: Where, target: Target) -> list[Job]:
    """Prefill, and a block of decoding with the largest caches."""
    base, made, where = base_of(model), generator(model, sampled, target), rollout_places(where)
    shape = max(made.shapes, key=lambda s: s.rows * s.group * s.length)
    with tracing(target, target.sampling_mesh):
        cache, shared = jax.eval_shape(lambda: empty_program(base, shape=shape, prompt=sampled.prompt))
    n, k = shape[:2]
    per_row = jax.ShapeDtypeStruct((n,), jnp.int32)
    rows = Rows(per_row, per_row, per_row, jax.ShapeDtypeStruct((n, k), jnp.int32), per_row)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = prompt_batch(base, rows=made.prefilled_at_once, prompt=sampled.prompt, images=sampled.lengths.images)
    weights = where.sampled(_sampled_from(model, target))
    caches = _put_caches(cache, where, heads=2), _put_caches(shared, where, heads=1)
    decoding = partial(decode_block, base, steps=made.steps, sampling=sampled.sampling)
    on_gpu, mesh = bool(target.devices) and target.devices[0].platform != "cpu", target.sampling_mesh
    return [
        Job(f"{sampled.name} prefill", partial(prefill, base), (weights, _put_batch(batch, where)), mesh=mesh),
        Job(
            f"{sampled.name} decode",
            decoding,
            (weights, *caches, put(rows, where.rows), put(key, where.whole)),
            donated=(1,),
            options=DECODING,
            counted=on_gpu,
            mesh=mesh,
        ),
    ]


def _put_caches(tree: Any, where: Where, *, heads: int) -> Any:
    """As `rollout.cache` places them: cut by rows, and keys and values at dim `heads` over `tensor` where it divides."""
    if where.sampling is None:
        return put(tree, where.rows)
    mesh = where.sampling.mesh

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # The states of completions, [n, k, embed], are whole but for their rows.
        cut = len(x.shape) > 3 and x.shape[heads] % mesh.shape[TENSOR] == 0
        spec = PartitionSpec(ROWS, *[None] * (heads - 1), TENSOR) if cut else PartitionSpec(ROWS)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def _sampled_from(model: Model, target: Target) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the parameters of a rollout: the base's, and merged ones, joined where they are."""
    shapes, join = whole(base_of(model)), joins_here(target.mesh, target.sampling_mesh)
    made = {name: shapes[name] for name in changed_names(model)}
    return with_made(model, shapes, jax.eval_shape(lambda made: joined(model, made), made) if join else made)


def trainer(model: Model, update: Update, where: Where) -> Trainer:
    """The stage's own trainer. Parameters of the reference are arguments of its programs: none are needed here."""
    reference = (model, {}) if update.objective.needs_reference else None
    return Trainer(model, update.objective, update.optimiser, reference=reference, placement=where.training)


def micro_job(model: Model, update: Update, where: Where, target: Target) -> Job:
    """Gradients of one micro-batch, added to those before."""
    frozen, trained = where.trained(split(model).frozen), where.trained(trained_in(model, update))
    batch, recorded = update_batch(model, update)
    placed = _put_batch(batch, where), put(recorded, where.rows), put(counts(model, update), where.whole)
    step = put(jax.ShapeDtypeStruct((), jnp.int32), where.whole)
    function = trainer(model, update, where)._micro
    arguments = (trained, trained, frozen, *placed, step)
    return Job(f"{update.name} gradients", function, arguments, donated=(0,), mesh=target.mesh)


def apply_job(model: Model, update: Update, where: Where, target: Target) -> Job:
    """The optimiser's step."""
    trained = where.trained(trained_in(model, update))
    scalar = put(jax.ShapeDtypeStruct((), jnp.int32), where.whole)
    state = TrainState(dict(trained), moments(model, update, where), scalar)
    loss = put(jax.ShapeDtypeStruct((), jnp.float32), where.whole)
    function, arguments = trainer(model, update, where)._update, (state, dict(trained), loss)
    return Job(f"{update.name} optimiser", function, arguments, donated=(0,), mesh=target.mesh)


def moments(model: Model, update: Update, where: Where) -> Any:
    """What the optimiser keeps, where it keeps it."""
    trained = trained_in(model, update)
    found = jax.eval_shape(update.optimiser.init, trained)
    if where.training is None:
        return put(found, where.one)
    own = {name: where.training(name) for name in trained}
    shardings = optax.tree.map_params(
        update.optimiser, lambda _, sharding: sharding, found, own, transform_non_params=lambda _: where.whole
    )
    return jax.tree.map(put, found, shardings)


def reference_job(model: Model, update: Update, where: Where, target: Target) -> Job:
    """Log-probabilities of a micro-batch under the reference, which is an adapter of its own."""
    frozen, trained = map(where.trained, split(model))
    # Kept in the dtypes of the model, as the studies keep it.
    kept = used(model)
    extra = {n: jax.ShapeDtypeStruct(v.shape, kept[n].dtype, sharding=v.sharding) for n, v in trained.items()}
    function = trainer(model, update, where)._reference_scores
    arguments = (frozen, extra, _put_batch(update_batch(model, update)[0], where))
    return Job(f"{update.name} reference", function, arguments, mesh=target.mesh)


def _put_batch(batch: GroupBatch, where: Where) -> GroupBatch:
    """As `mesh.put_batch`: by rows, features whole."""
    placed = put(batch._replace(features=None), where.rows)
    return placed._replace(features=None if batch.features is None else put(batch.features, where.whole))
