"""Accelerators by name: the facts that a compiler and an estimate need, for GPUs that need not be here.

Peak rates and memories are those of NVIDIA's data sheets (A100, H100 SXM, H200) and of the Ada architecture white paper
(RTX 4090); dense, with float32 accumulation. What the compiler reads (cores, caches, shared memory, the memory that the
driver reports) is as OpenXLA publishes it for these GPUs.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

#: the device that JAX runs on, measured rather than looked up
THIS = "this"
#: of the roofline, for the hours to expect: what good training and decoding programs reach
SHARE = 0.5


@dataclass(frozen=True)
class Device:
    """Rates are upper bounds: nothing runs faster, most things run slower."""

    name: str
    title: str
    memory: int  #: bytes
    bandwidth: float  #: bytes per second
    flops: Mapping[str, float]  #: dtype -> FLOP/s of matrix products
    chip: Chip | None = None  #: None: no description to compile for


@dataclass(frozen=True)
class Chip:
    """What XLA's GPU compiler asks about a GPU, beyond memory and bandwidth."""

    capability: tuple[int, int]
    cores: int
    lanes: int  #: float32 units per core
    threads: int  #: per core, at most
    shared: int  #: bytes of shared memory per core
    shared_block: int  #: bytes that one block may ask for
    cache: int  #: bytes of the second-level cache
    clock: float  #: GHz


_AMPERE = Chip((8, 0), 108, 64, 2048, 167_936, 166_912, 41_943_040, 1.41)
_ADA = Chip((8, 9), 128, 128, 1536, 102_400, 101_376, 75_497_472, 2.52)
_HOPPER = Chip((9, 0), 132, 128, 2048, 233_472, 232_448, 52_428_800, 1.98)

# float32 products run as TF32, JAX's default on these GPUs.
_A100, _H100 = {"bfloat16": 312e12, "float32": 156e12}, {"bfloat16": 989e12, "float32": 494e12}

DEVICES = (
    Device("a100-40", "NVIDIA A100-SXM4-40GB", 42_331_013_120, 1555.2e9, _A100, _AMPERE),
    Device("a100-80", "NVIDIA A100-SXM4-80GB", 85_100_068_864, 2039.0e9, _A100, _AMPERE),
    Device("h100", "NVIDIA H100 80GB HBM3", 84_942_979_072, 3352.3e9, _H100, _HOPPER),
    Device("h200", "NVIDIA H200 141GB HBM3e", 151_397_597_184, 4800e9, _H100, _HOPPER),
    Device(
        "rtx4090-24",
        "NVIDIA GeForce RTX 4090",
        25_757_220_864,
        1008e9,
        {"bfloat16": 165.2e12, "float32": 82.6e12},
        _ADA,
    ),
)


def find_device(name: str) -> Device:
    """The device of this name; ValueError naming the nearest for one that is not in the table."""
    table = {device.name: device for device in DEVICES}
    if name in table:
        return table[name]
    near = [known for known in table if known.startswith(name.lower())] or difflib.get_close_matches(
        name.lower(), [*table, THIS], n=1, cutoff=0.4
    )
    raise ValueError(
        f"unknown device {name!r}; known: {', '.join([*table, THIS])}" + (f"; the nearest is {near[0]}" if near else "")
    )


#: of the software that programs are compiled for; a newer driver runs them too
_CUDA, _CUDNN = "12.8.0", (9, 10, 0)


def description(device: Device) -> str:
    """The text proto (`stream_executor.GpuTargetConfigProto`) from which XLA compiles for this GPU."""
    chip = device.chip
    assert chip is not None
    major, minor = chip.capability
    dnn = ".".join(map(str, _CUDNN))
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {chip.threads}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {chip.shared_block}
  shared_memory_per_core: {chip.shared}
  core_count: {chip.cores}
  fpus_per_core: {chip.lanes}
  clock_rate_ghz: {chip.clock}
  l2_cache_size: {chip.cache}
  memory_bandwidth: {round(device.bandwidth)}
  device_memory_size: {device.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  driver_version: "{_CUDA}"
  runtime_version: "{_CUDA}"
  compile_time_toolkit_version: "{_CUDA}"
  dnn_version: "{dnn}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {_CUDNN[0]} minor: {_CUDNN[1]} patch: {_CUDNN[2]} }}
device_description_str: "{device.title}"
"""
