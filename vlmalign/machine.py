"""What a run ran on: versions, devices, and how fast this machine multiplies matrices.

Seconds mean little without the machine: timings are published next to `matmul_rate`, and compared after dividing by it.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_PACKAGES = (
    "vlmalign",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "transformers",
    "numpy",
)


def environment_record() -> dict[str, Any]:
    """Versions, platform, CPU count and devices, ready for JSON. Holds no host, user or path name."""
    import jax

    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": _cpu_count(),
        "processes": jax.process_count(),
        "devices": [{"platform": d.platform, "kind": d.device_kind} for d in jax.devices()],
    }


def matmul_rate(*, rounds: int = 7, calls: int = 5) -> float:
    """GFLOP/s (1e9) of a float32 product [2048, 384] x [384, 1536] on the default device: the median of `rounds`.

    A product of m x k and k x n counts as 2 m k n operations. The sizes are those of a small model's feed-forward
    layer, which is what the tests and the quickstart spend their time on.
    """
    import jax
    import jax.numpy as jnp

    m, k, n = 2048, 384, 1536
    left_key, right_key = jax.random.split(jax.random.key(0))
    left = jax.random.normal(left_key, (m, k), jnp.float32)
    right = jax.random.normal(right_key, (k, n), jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    product(left, right).block_until_ready()  # compiles
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(calls):
            product(left, right).block_until_ready()
        seconds.append((time.perf_counter() - started) / calls)
    return 2 * m * k * n / statistics.median(seconds) / 1e9


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_count() -> int:
    """The cores this process may use: fewer than the machine's under a scheduler or in a container with a CPU set."""
    return len(os.sched_getaffinity(0)) if platform.system() == "Linux" else (os.cpu_count() or 1)
