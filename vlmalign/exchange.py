"""What the processes of a run tell each other: records and arrays, so that all of them hold the same ones.

Every process must make the same calls in the same order; each call waits for all of them. In a run of one process they
return at once and move nothing. Records are JSON values (dict keys are text, tuples arrive as lists) and numpy arrays;
nothing is pickled. They travel as bytes through the devices, by the collectives that gradients travel by.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from vlmalign.distributed import is_writer, own_share, process_count
from vlmalign.mesh import Placement
from vlmalign.shapes import Array

__all__ = ["agree", "fetch", "from_first", "gather", "gather_from", "is_writer", "local_view", "own_share"]

Made = TypeVar("Made")

#: bytes that all processes together hold on a device while records travel
ROOM = 2**28
_ARRAY = "\0array"


def gather(items: Sequence[Any]) -> list[Any]:
    """The items of all processes, in process order; processes may have different numbers of them.

    Raises:
        ValueError: for an item that is neither JSON nor a numpy array of numbers, in the process that has it.
    """
    if process_count() == 1:
        return list(items)
    return [item for part in _exchange(_packed(list(items))) for item in _unpacked(part)]


def gather_from(make: Callable[[], Sequence[Any]]) -> list[Any]:
    """The items that `make` returns in each process, in process order.

    A mistake (ValueError, OSError) in one process is raised in all: otherwise the others would wait for it for ever.
    """
    return [item for items in _together(lambda: list(make())) for item in items]


def from_first(make: Callable[[], Made]) -> Made:
    """What `make` returns in process 0, where alone it is called; its mistakes are raised in all processes."""
    return _together(make if is_writer() else lambda: None)[0]


def agree(value: Any, what: str) -> None:
    """Raises ValueError in all processes when they do not have the same `value` (JSON) of `what`."""
    found = gather([value])
    for process, other in enumerate(found):
        if other != found[0]:
            raise ValueError(
                f"the processes of this run differ in {what}: process 0 has {found[0]}, process {process} has {other}; "
                "start all of them with the same command, code and files"
            )


def fetch(tree: Any) -> Any:
    """Arrays as numpy, whole in every process, also those of which this process holds a part only."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(one, tree)


def local_view(params: Mapping[str, Array], where: Placement) -> dict[str, Array]:
    """Parameters of all processes as arrays of this one, for work that it does alone; nothing is copied.

    `where` places them on this process's devices (a mesh of `jax.local_devices()`), which must hold the parts already:
    reshard to copies on every device first, or to a cut that lies within each process.

    Raises:
        ValueError: naming a parameter of which a device holds another part.
    """
    return {name: _local(name, value, where(name)) for name, value in params.items()}


def _local(name: str, value: Array, sharding: jax.sharding.Sharding) -> Array:
    held = {shard.device: shard for shard in value.addressable_shards}
    wanted = sharding.devices_indices_map(value.shape)
    for device, index in wanted.items():
        if device not in held or _bounds(held[device].index, value.shape) != _bounds(index, value.shape):
            raise ValueError(
                f"{name}: {device} does not hold what {sharding} places there, found {value.sharding}; reshard it "
                "first, so that every process has a whole copy"
            )
    return jax.make_array_from_single_device_arrays(value.shape, sharding, [held[device].data for device in wanted])


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> list[tuple[int, int, int]]:
    return [part.indices(size) for part, size in zip(index, shape, strict=True)]


def _together(make: Callable[[], Any]) -> list[Any]:
    """What `make` returned in each process; what it raised in one is raised in all."""
    if process_count() == 1:
        return [make()]
    mine: dict[str, Any] = {"made": None, "failed": None}
    error = None
    try:
        mine["made"] = make()
    except (ValueError, OSError) as caught:
        error, mine["failed"] = caught, str(caught)
    outcomes = gather([mine])
    if error is not None:
        raise error
    for process, outcome in enumerate(outcomes):
        if outcome["failed"] is not None:
            raise ValueError(f"process {process} stopped: {outcome['failed']}")
    return [outcome["made"] for outcome in outcomes]


def _packed(items: list[Any]) -> bytes:
    """JSON, in which each array stands for its dtype, shape and place among the bytes that follow."""
    parts: list[bytes] = []
    end = 0

    def keep(value: Any) -> dict[str, Any]:
        nonlocal end
        if not isinstance(value, np.ndarray) or value.dtype.hasobject or value.dtype.kind in "USMm":
            raise ValueError(
                f"processes exchange JSON values and numpy arrays of numbers, found {type(value)}: {value!r}"
            )
        parts.append(value.tobytes())
        begin, end = end, end + len(parts[-1])
        return {_ARRAY: [value.dtype.name, list(value.shape), begin, end]}

    try:
        head = json.dumps(items, default=keep).encode()
    except TypeError as error:
        raise ValueError(f"processes exchange JSON values and numpy arrays of numbers: {error}") from error
    return b"".join([len(head).to_bytes(8, "little"), head, *parts])


def _unpacked(data: bytes) -> list[Any]:
    begin = 8 + int.from_bytes(data[:8], "little")
    rest = memoryview(data)[begin:]

    def arrays(found: dict[str, Any]) -> Any:
        if found.keys() != {_ARRAY}:
            return found
        dtype, shape, start, end = found[_ARRAY]
        return np.frombuffer(rest[start:end], np.dtype(dtype)).reshape(shape).copy()

    return json.loads(data[8:begin], object_hook=arrays)


def _exchange(data: bytes) -> list[bytes]:
    """The bytes of every process. Sizes are rounded up to powers of two: each is a program that is compiled once."""
    size = np.array(divmod(len(data), 2**30), np.int32)
    lengths = [int(high) * 2**30 + int(low) for high, low in multihost_utils.process_allgather(size)]
    piece = max(2**10, ROOM // 2 ** (process_count() - 1).bit_length())
    found = [bytearray() for _ in lengths]
    for start in range(0, max(lengths), piece):
        room = min(piece, 1 << max(10, (max(lengths) - start - 1).bit_length()))
        own = np.zeros(room, np.uint8)
        part = np.frombuffer(data[start : start + room], np.uint8)
        own[: len(part)] = part
        for whole, row in zip(found, multihost_utils.process_allgather(own), strict=True):
            whole += row.tobytes()
    return [bytes(whole[:length]) for whole, length in zip(found, lengths, strict=True)]
