"""How fast each framework multiplies float32 matrices here: what part of a ratio is not the toolkits' doing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import torch

SHAPES = ((2048, 384, 1536), (8, 384, 16_384))
PACKAGES = ("jax", "jaxlib", "torch", "transformers", "trl", "peft", "accelerate")


def matmul_rates(repeats: int = 15) -> dict[str, dict[str, float]]:
    """GFLOP/s of [m, k] x [k, n] by framework and shape; medians, the frameworks in turn."""
    found: dict[str, dict[str, float]] = {"jax": {}, "torch": {}}
    for m, k, n in SHAPES:
        a, b = jnp.ones((m, k)), jnp.ones((k, n))
        multiply = jax.jit(jnp.matmul)
        x, y = torch.ones(m, k), torch.ones(k, n)
        sides: dict[str, Callable[[], object]] = {
            "jax": lambda a=a, b=b, f=multiply: f(a, b).block_until_ready(),
            "torch": lambda x=x, y=y: x @ y,
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(repeats + 2):
            for name, run in sides.items():
                began = time.perf_counter()
                for _ in range(10):
                    run()
                seconds[name].append((time.perf_counter() - began) / 10)
        for name, taken in seconds.items():
            found[name][f"[{m}, {k}] x [{k}, {n}]"] = 2e-9 * m * k * n / statistics.median(taken[2:])
    return found


def versions() -> dict[str, object]:
    """Packages, Python, cores and processor."""
    return {
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "torch_threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
