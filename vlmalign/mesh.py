"""Which device holds what: the mesh from its settings, and one table that turns a tensor's dims into mesh axes.

Devices stand on four axes, the slowest links outermost. Batches are cut by rows over `ROWS`, so every mesh trains on
the same sums:

    replica   copies of everything, one per node or group of nodes; only gradients cross it
    data      copies of the parameters; batches are cut by rows
    fsdp      parameters, gradients and moments are cut (ZeRO-3, arXiv 1910.02054), and so are batches
    tensor    heads, feed-forward and vocabulary are cut (arXiv 1909.08053); its devices work on the same rows

LoRA wants `data` alone: the base is whole on every device and only adapter gradients are reduced. Full fine-tuning
wants `fsdp`. Rollouts read weights whole, or over `tensor`: `reshard` brings them there, once per step.

Axes are "auto": arrays carry their sharding and the compiler places the collectives. Code within a compiled function
says what it needs by `constrain` and `per_shard`, which do nothing where no mesh is in force (`on_mesh`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlmalign.shapes import Array
from vlmalign.types import GroupBatch

log = logging.getLogger(__name__)

AXES = REPLICA, DATA, FSDP, TENSOR = ("replica", "data", "fsdp", "tensor")
#: the axes over which batches are cut by rows
ROWS = (REPLICA, DATA, FSDP)

Axes = tuple[str, ...]

#: logical dim -> the mesh axes that cut it; (): never cut
AXES_OF: Mapping[str, Axes] = {
    "vocab": (TENSOR,),
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "ffn": (TENSOR,),
    "merged": (TENSOR,),
    "embed": (FSDP,),
    "tower_embed": (FSDP,),
    "rank": (),
    "head_dim": (),
    "channel": (),
    "frame": (),
    "patch": (),
}
#: parameters with these dims are cut otherwise
EXCEPTIONS: Mapping[tuple[str, ...], tuple[Axes, ...]] = {
    # What makes the first activations must not be cut by their width: every layer after it would inherit that cut.
    ("vocab", "embed"): ((FSDP, TENSOR), ()),
    ("embed", "channel", "patch", "patch"): ((), (), (), ()),
    ("tower_embed", "channel", "frame", "patch", "patch"): ((), (), (), (), ()),
    ("patch", "embed"): ((), ()),
    # Both dims would be cut by one axis.
    ("tower_embed", "embed"): ((TENSOR,), (FSDP,)),
    ("merged", "merged"): ((TENSOR,), (FSDP,)),
    # Qwen's tower holds q, k and v in one matrix: a cut by tensor would run across them.
    ("heads", "tower_embed"): ((), (FSDP,)),
    ("tower_embed", "heads"): ((FSDP,), ()),
}


@dataclass(frozen=True)
class MeshSettings:
    """Devices along each axis; one of them may be -1: all that the others leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        sizes = {field.name: getattr(self, field.name) for field in fields(self)}
        wrong = [f"{name}: {size}" for name, size in sizes.items() if size < 1 and size != -1]
        if wrong or list(sizes.values()).count(-1) > 1:
            raise ValueError(
                "mesh axes take a number of devices >= 1, and one of them -1 (the rest); found "
                + ", ".join(wrong or [f"{name}: {size}" for name, size in sizes.items()])
            )


def default_mesh(*, lora: bool) -> MeshSettings:
    """Copies of the base for an adapter, whose gradients are small; everything cut for the training of all parameters."""
    return MeshSettings() if lora else MeshSettings(data=1, fsdp=-1)


def build_mesh(settings: MeshSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices (of every process) on the four axes.

    Raises:
        ValueError: when the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [settings.replicas, settings.data, settings.fsdp, settings.tensor]
    given = math.prod(size for size in sizes if size != -1)
    shape = [len(devices) // given if size == -1 else size for size in sizes]
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"a mesh of {', '.join(f'{axis} {size}' for axis, size in zip(AXES, sizes, strict=True))} does not fit "
            f"{len(devices)} devices; their product must be {len(devices)} (-1 takes the rest)"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def sharding_of(
    name: str,
    shape: Sequence[int],
    dims: Sequence[str],
    mesh: Mesh | AbstractMesh,
    *,
    over: Sequence[str] = (FSDP, TENSOR),
    pieces: Mapping[str, int] | None = None,
) -> tuple[NamedSharding, list[str]]:
    """Where one parameter lives, and for each dim that stays whole although its axis is in use, why.

    Args:
        over: the axes that may cut parameters; () for a copy on every device.
        pieces: dim -> of how many pieces that must not be cut it consists ("kv_heads": 4).

    Raises:
        ValueError: naming the tensor, when a dim is not in the table or two dims would be cut by one axis.
    """
    unknown = [dim for dim in dims if dim not in AXES_OF]
    if unknown or len(dims) != len(shape):
        raise ValueError(
            f"{name} {list(shape)}: its dims are {list(dims)}; mesh.AXES_OF must have a line for each of them"
        )
    # A vector's share is too small to be worth gathering; its bytes are a thousandth of the matrices'.
    used = [axis for axis in over if mesh.shape[axis] > 1 and not (axis == FSDP and len(shape) < 2)]
    wanted = EXCEPTIONS.get(tuple(dims), tuple(AXES_OF[dim] for dim in dims))
    cuts = [tuple(axis for axis in axes if axis in used) for axes in wanted]
    flat = [axis for axes in cuts for axis in axes]
    if len(set(flat)) < len(flat):
        raise ValueError(f"{name}: dims {list(dims)} would be cut twice by one axis ({flat}); add them to EXCEPTIONS")
    spec, kept = [], []
    for dim, size, axes in zip(dims, shape, cuts, strict=True):
        count = (pieces or {}).get(dim, size)
        while axes and math.gcd(size, count) % math.prod(mesh.shape[axis] for axis in axes):
            kept.append(f"{name}: {dim} of {count} by {axes[-1]} of {mesh.shape[axes[-1]]}")
            axes = axes[:-1]
        spec.append(axes[0] if len(axes) == 1 else axes or None)
    return NamedSharding(mesh, PartitionSpec(*spec)), kept


@dataclass(frozen=True)
class Placement:
    """Where the parameters of one model live; what is not in `shardings` (a value head) is whole on every device."""

    mesh: Mesh | AbstractMesh
    shardings: Mapping[str, NamedSharding]

    def __call__(self, name: str, like: object = None) -> NamedSharding:
        """The sharding of the parameter `name`; also what `weights.checkpoint.load_params` calls."""
        del like
        return self.shardings.get(name, replicated(self.mesh))


def placement(
    mesh: Mesh | AbstractMesh,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    dims: Mapping[str, Sequence[str]],
    *,
    over: Sequence[str] = (FSDP, TENSOR),
    pieces: Mapping[str, int] | None = None,
) -> Placement:
    """Where the parameters of a model (`Model.shapes`, `Model.dims`) live. Dims that do not divide stay whole.

    Raises:
        ValueError: when an axis of several devices cuts none of the matrices between layers, or as `sharding_of`.
    """
    found, kept = {}, []
    for name, value in shapes.items():
        found[name], whole = sharding_of(name, value.shape, dims[name], mesh, over=over, pieces=pieces)
        kept += whole
    inner = [place.spec for name, place in found.items() if len(dims[name]) > 1 and "vocab" not in dims[name]]
    for axis in over:
        if mesh.shape[axis] > 1 and not any(axis in spec for spec in inner):
            raise ValueError(
                f"the mesh has {axis} {mesh.shape[axis]}, which divides no projection of this model ({'; '.join(kept[:5])}); "
                f"set {axis} to a divisor of these, or to 1"
            )
    if kept:
        log.info("%d dims stay whole, since their axis does not divide them: %s", len(kept), "; ".join(kept))
    return Placement(mesh, found)


def cuts_weights(mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether devices of this mesh hold but a part of some matrices."""
    return mesh is not None and mesh.shape[FSDP] * mesh.shape[TENSOR] > 1


def reshard(params: Mapping[str, Any], where: Placement) -> dict[str, Array]:
    """The parameters, JAX's or NumPy's, each where `where` says; those that are there already are not copied."""
    return jax.device_put(dict(params), {name: where(name) for name in params})


def require_placed(params: Mapping[str, Array], where: Placement) -> None:
    """Raises ValueError naming a parameter that lives elsewhere, and would be copied anew in every call."""
    for name, value in params.items():
        if not value.sharding.is_equivalent_to(where(name), value.ndim):
            raise ValueError(
                f"{name} does not live where its placement says: expected {where(name).spec} on {where.mesh.size} "
                f"devices, found {value.sharding}; load it there (load_params(..., sharding=placement)) or move it "
                "once with mesh.reshard"
            )


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Cut by rows, the leading dim."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def put_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with a row per leading index, each row on its devices. Every process must hold all rows.

    Raises:
        ValueError: when the rows do not divide over the devices that share them out.
    """
    if mesh is None:
        return tree
    sharding = batch_sharding(mesh)

    def put(x: Any) -> Array:
        require_rows(x.shape[0], mesh, "the rows of a micro-batch, and its images,")
        return _put(x, sharding)

    return jax.tree.map(put, tree)


def put_whole(tree: Any, mesh: Mesh | None) -> Any:
    """Arrays with a copy on every device. Every process must hold them."""
    return tree if mesh is None else jax.tree.map(lambda x: _put(x, replicated(mesh)), tree)


def row_shares(mesh: Mesh | AbstractMesh | None) -> int:
    """How many devices share out the rows of a batch; batches have a multiple of so many."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in ROWS)


def require_rows(rows: int, mesh: Mesh | AbstractMesh | None, what: str) -> None:
    """Raises ValueError when so many rows do not divide over the devices that share them out; `what` should change."""
    if rows % (shares := row_shares(mesh)):
        raise ValueError(
            f"{rows} rows cannot be shared out to {shares} devices ({_sizes(mesh)}); make {what} a multiple of {shares}"
        )


def put_batch(batch: GroupBatch, mesh: Mesh | None) -> GroupBatch:
    """A batch cut by rows (and its pixels by images). Features are whole everywhere: any row may show any image."""
    if mesh is None:
        return batch
    return put_rows(batch._replace(features=None), mesh)._replace(features=put_whole(batch.features, mesh))


def _put(x: Any, sharding: NamedSharding) -> Array:
    if isinstance(x, jax.Array):
        return jax.device_put(x, sharding)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def on_mesh(fn: Callable, mesh: Mesh | None) -> Callable:
    """The compiled function `fn` with `mesh` in force while it is traced and called; `fn` itself without a mesh."""
    if mesh is None:
        return fn
    # On CPUs the collectives of two programs that run at once, over several processes, wait for each other for ever.
    in_turn = isinstance(mesh, Mesh) and mesh.is_multi_process and mesh.devices.flat[0].platform == "cpu"

    @wraps(fn)
    def call(*args: Any, **options: Any) -> Any:
        with jax.set_mesh(mesh):
            found = fn(*args, **options)
        return jax.block_until_ready(found) if in_turn else found

    return call


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """`x` with its dims cut by these axes (None: whole), inside a compiled function.

    A dim that its axes do not divide stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x

    def divides(size: int, cut: str | tuple[str, ...] | None) -> bool:
        names = (cut,) if isinstance(cut, str) else cut or ()
        return size % math.prod(mesh.shape[name] for name in names) == 0

    spec = [cut if divides(size, cut) else None for size, cut in zip(x.shape, axes, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def per_shard(fn: Callable, *, cut: Sequence[bool]) -> Callable:
    """`fn` run by every device on its own share, inside a compiled function; results are shares too.

    `cut` says for each argument whether it is cut along its leading dim, or whole on every device. All axes share the
    work out, `tensor` too where it divides the leading dim.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return fn

    def call(*args: Array) -> Any:
        size = next(x.shape[0] for x, own in zip(args, cut, strict=True) if own)
        axes = next(a for a in (AXES, ROWS, ()) if size % math.prod(mesh.shape[axis] for axis in a) == 0)
        share = PartitionSpec(axes)
        specs = tuple(share if own else PartitionSpec() for own in cut)

        def shard(*args: Array) -> Any:
            # Each device's own from here on: their gradients are added up once, at the end, and not where they are used.
            return fn(*(x if own else jax.lax.pcast(x, axes, to="varying") for x, own in zip(args, cut, strict=True)))

        return jax.shard_map(shard, in_specs=specs, out_specs=share)(*args)

    return call


def _sizes(mesh: Mesh) -> str:
    return ", ".join(f"{axis} {mesh.shape[axis]}" for axis in ROWS)
