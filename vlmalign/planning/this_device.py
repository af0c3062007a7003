"""The device that JAX runs on here: its memory as the system tells it, its rates measured in a few seconds."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vlmalign.planning.devices import THIS, Device
from vlmalign.shapes import Array

ROUNDS = 5
#: calls between two looks at the clock: a GPU is still at the first ones while the last ones are being launched
CALLS = {"cpu": 1, "gpu": 20}
#: side of the measured product, and bytes of the measured copy: large enough that calling costs nothing beside them
SIDE = {"cpu": 1024, "gpu": 8192}
COPY = {"cpu": 128 << 20, "gpu": 1 << 30}


def this_device(dtype: str) -> Device:
    """The first device of this process. Rates are medians of `ROUNDS`, in this dtype, with whatever else runs on it now."""
    device = jax.local_devices()[0]
    side, size, calls = (table[device.platform] for table in (SIDE, COPY, CALLS))
    # Random: on equal numbers a GPU draws less power and runs faster than it ever does in training.
    square = jax.random.normal(jax.random.key(0), (side, side), dtype)
    product = jax.jit(lambda a: a @ a)
    block = jnp.ones((size // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    return Device(
        THIS,
        f"{device.device_kind} ({device.platform})",
        _memory(device),
        bandwidth=2 * size / _seconds(copy, block, calls),  # read and written
        flops={dtype: 2 * side**3 / _seconds(product, square, calls)},
    )


def unmeasured_device() -> Device:
    """The first device of this process, for questions of memory alone: its rates are left out."""
    device = jax.local_devices()[0]  # of another process, only that one knows the memory
    return Device(THIS, f"{device.device_kind} ({device.platform})", _memory(device), math.nan, {})


def _memory(device: jax.Device) -> int:
    """What JAX may take; of a CPU, all there is."""
    stats = device.memory_stats() or {}
    return stats.get("bytes_limit") or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _seconds(run: Callable[[Array], Array], x: Array, calls: int) -> float:
    """Of one call, the median of `ROUNDS`."""
    run(x).block_until_ready()  # compiles
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        for _ in range(calls):
            found = run(x)
        found.block_until_ready()
        taken.append((time.perf_counter() - started) / calls)
    return statistics.median(taken)
