"""What programs are compiled for: the devices here, or descriptions of GPUs that are not, with no driver and no GPU.

XLA compiles for a description of a GPU where JAX's CUDA plug-in is installed. While such a program is traced, whoever
asks which GPU there is must hear of the described one: `tracing`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractMesh, AxisType, Mesh, SingleDeviceSharding

from vlmalign.mesh import AXES, MeshSettings, build_mesh
from vlmalign.planning.devices import THIS, Device, description
from vlmalign.planning.kernels import KernelFiles

#: either pair compiles; the first is what the extra `plan` installs
PLUG_INS = (("jax-cuda12-plugin", "jax-cuda12-pjrt"), ("jax-cuda13-plugin", "jax-cuda13-pjrt"))
#: NVIDIA's assembler and mathematical functions, which every kernel needs, for each pair
ASSEMBLERS = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc nvidia-nvvm")

#: What is compiled differs in these from what a GPU compiles for itself, where it tries kernels out:
#: - Up to JAX 0.10 products go to cuBLAS. The Triton kernels that a GPU chooses by trying need sizes that nothing has
#:   tried here; with their defaults, products of some sizes do not compile at all. From 0.11 on they do, and the plan
#:   comes closer: of an update of MedGemma-4B without rematerialisation an H200 took 40.98 GiB, where 0.11 foresees
#:   40.96 with them and 37.2 without, 0.10 36.1.
#: - A row's softmax is not made one Triton kernel, the search for whose tiles takes most of the compile time. Peak
#:   memory changed by 0.02 % (update of MedGemma-4B, 20,032 tokens, A100).
#: - LLVM does not optimise kernels: nothing here runs, and memory is planned before.
#: - Kernels are not gathered into CUDA graphs, where nobody counts launches: to find out which of thousands hang on each
#:   other takes a sixth of the compile time and changes no memory.
#: - A program is compiled by one thread: others are compiled beside it, and the idle threads of each one's pool took a
#:   sixth of the processor's time looking for work.
GRAPH_SIZE = "xla_gpu_graph_min_graph_size"
COMPILER_OPTIONS: dict[str, Any] = {
    "xla_gpu_enable_triton_gemm": jax.__version_info__ >= (0, 11),
    "xla_disable_hlo_passes": "triton-softmax-rewriter",
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    GRAPH_SIZE: 2**31 - 1,
    "xla_gpu_force_compilation_parallelism": 1,
}


@dataclass(frozen=True)
class Target:
    """`count` devices of one kind. `devices` is empty where nothing can be compiled for them, and `refusal` says why."""

    device: Device
    count: int
    devices: tuple[jax.Device, ...] = ()
    refusal: str | None = None
    #: how they stand in training; by default, with copies of the parameters
    axes: MeshSettings = field(default_factory=MeshSettings)
    sampling_axes: MeshSettings = field(default_factory=MeshSettings)  #: in rollouts
    kernels: KernelFiles | None = field(default=None, compare=False)  #: of a GPU that is not here: what is kept of them

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        """Of training; without devices where nothing can be compiled, and None for one device."""
        return self._mesh(self.axes)

    @property
    def sampling_mesh(self) -> Mesh | AbstractMesh | None:
        """Of rollouts: every device has all weights, or those are cut over `tensor`."""
        return self._mesh(self.sampling_axes)

    @property
    def row_shares(self) -> int:
        """Parts into which the rows of a micro-batch are cut."""
        return self.count // self.axes.tensor

    @property
    def sampling_shares(self) -> int:
        """Parts into which the rows of a rollout are cut."""
        return self.count // self.sampling_axes.tensor

    def _mesh(self, axes: MeshSettings) -> Mesh | AbstractMesh | None:
        if self.count == 1:
            return None
        sizes = build_sizes(axes, self.count)
        if self.devices:
            return build_mesh(axes, self.devices)
        return AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))

    @property
    def options(self) -> dict[str, Any]:
        """For the compiler. Of a device that is here, nothing but its own."""
        return {} if self.device.name == THIS else dict(COMPILER_OPTIONS)


def plug_in_problem() -> str | None:
    """Why nothing can be compiled for a GPU that is not here, and what to do; None when it can be."""
    wanted = version("jax")
    install = f"pip install {' '.join(f'{name}=={wanted}' for name in PLUG_INS[0])}"
    found = [installed for names in PLUG_INS if (installed := _versions(names)) is not None]
    if not found:
        return f"JAX's CUDA plug-in is not installed (no driver and no GPU are needed): {install}"
    if not any(set(versions.values()) == {wanted} for versions in found):
        said = ", ".join(f"{name} {each}" for name, each in found[0].items())
        return f"{said} do not belong to jax {wanted}: {install}"
    return None


def assembler_problem(device: jax.Device) -> str | None:
    """Why no kernel can be made for a described GPU, and what to do; None when one was."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(jnp.exp).trace(number).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        pairs = zip(PLUG_INS, ASSEMBLERS, strict=True)
        packages = next(package for names, package in pairs if _versions(names) is not None)
        said = str(error).splitlines()[0]
        return f"XLA makes no kernels here ({said}); NVIDIA's assembler and functions come with: pip install {packages}"
    return None


def _versions(names: tuple[str, ...]) -> dict[str, str] | None:
    """Of these packages; None where one is missing."""
    try:
        return {name: version(name) for name in names}
    except PackageNotFoundError:
        return None


def build_sizes(axes: MeshSettings, count: int) -> tuple[int, ...]:
    """Devices along each of `mesh.AXES`.

    Raises:
        ValueError: when the axes do not multiply to `count`.
    """
    given = [axes.replicas, axes.data, axes.fsdp, axes.tensor]
    fixed = math.prod(size for size in given if size != -1)
    sizes = tuple(max(1, count // fixed) if size == -1 else size for size in given)
    if math.prod(sizes) != count:
        raise ValueError(
            f"a mesh of {', '.join(f'{a} {n}' for a, n in zip(AXES, given, strict=True))} does not fit {count} devices; "
            "change the section mesh of the config, or --count"
        )
    return sizes


def open_target(
    device: Device, count: int, axes: MeshSettings = MeshSettings(), sampling_axes: MeshSettings = MeshSettings()
) -> Target:
    """The devices to compile for, on these axes in training and in rollouts.

    Raises:
        ValueError: for a count below 1 or one that the axes do not fit, and for more devices than there are where they
            are meant to be here.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1 device, found {count}")
    for each in (axes, sampling_axes):
        build_sizes(each, count)
    made = partial(Target, device, count, axes=axes, sampling_axes=sampling_axes)
    if device.name == THIS:
        here = jax.devices()
        if count > len(here):
            raise ValueError(f"count is {count}, but only {len(here)} devices are here; name a device of the table")
        return made(tuple(here[:count]))
    problem = plug_in_problem()
    if problem is not None:
        return made(refusal=problem)
    found = topologies.get_topology_desc(platform="cuda", target_config=description(device), topology=f"1x1x{count}")
    problem = assembler_problem(found.devices[0])
    if problem is not None:
        return made(refusal=problem)
    return made(tuple(found.devices), kernels=KernelFiles())


@contextmanager
def tracing(target: Target, mesh: Mesh | None = None) -> Iterator[None]:
    """Within, code that asks which devices there are, or what cuDNN can do on them, hears of the target's; `mesh` is in
    force."""
    with ExitStack() as stack:
        if target.device.name != THIS:
            for owner, name, answer in _answers(target):
                stack.enter_context(_replaced(owner, name, answer))
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        yield


def _answers(target: Target) -> list[tuple[Any, str, Callable[..., Any]]]:
    """(module, function, what it says instead). cuDNN's own checks ask a driver that is not here."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    assert target.device.chip is not None
    capability = target.device.chip.capability

    def parsed(text: str) -> tuple[int, ...]:
        return tuple(map(int, text.split(".")))

    return [
        (jax, "devices", lambda backend=None: list(target.devices)),
        (cudnn, "check_cudnn_version", lambda: 91000),
        (cudnn, "check_compute_capability", lambda least: capability >= parsed(least)),
        (cudnn, "is_cuda_compute_capability_equal", lambda asked: capability == parsed(asked)),
    ]


@contextmanager
def _replaced(owner: Any, name: str, answer: Callable[..., Any]) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, answer)
    try:
        yield
    finally:
        setattr(owner, name, before)
