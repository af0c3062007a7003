"""Plans whose programs are compiled: for the device here, where a run shows whether they are right, and for GPUs that are not."""

import gc
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from small_plan import small_workload
from tiny_checkpoints import QUICK

from vlmalign.planning.batches import base_of, split
from vlmalign.planning.cost import adapter_weights
from vlmalign.planning.devices import DEVICES, THIS, Device, find_device
from vlmalign.planning.jobs import Job, changed_names
from vlmalign.planning.kernels import KernelFiles
from vlmalign.planning.memory import phases, usable
from vlmalign.planning.plan import jobs, make_plan
from vlmalign.planning.programs import compile_all, lower, options_of, read_compiled
from vlmalign.planning.target import Target, open_target, plug_in_problem, tracing

pytestmark = pytest.mark.full

PROBLEM = plug_in_problem()
needs_plug_in = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

HERE = Device(THIS, "this", 16 << 30, 1e10, {"float32": 1e11, "bfloat16": 1e11})


@pytest.fixture(scope="module")
def workload(tmp_path_factory):
    return small_workload(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def compiled(workload):
    """Every program of the run, compiled here: name -> executable."""
    target = open_target(HERE, 1)
    return {
        job.name: lower(job, target).compile(compiler_options={**QUICK, **options_of(job, target)})
        for job in jobs(workload, target)
    }


def test_every_program_of_a_run(compiled):
    assert set(compiled) == {
        "encode", "merge", "grpo prefill", "grpo decode", "grpo reference", "grpo gradients", "sft gradients",
        "sft optimiser", "grpo optimiser",
    }  # fmt: skip


def test_arguments_are_what_the_phases_hold(workload, compiled):
    """The compiler counts the same bytes of arguments as arithmetic does: parameters, sums, batch."""
    programs = {name: read_compiled(name, each) for name, each in compiled.items()}
    found = {phase.name: phase for phase in phases(workload, programs, open_target(HERE, 1))}
    assert {phase.how for name, phase in found.items() if not name.startswith("answers")} == {"compiled"}
    model = workload.model
    adapter = 4 * adapter_weights(model)
    merge = programs["merge"].memory
    base = sum(v.size * v.dtype.itemsize for v in split(model).frozen.values())
    changed = [model.shapes[name] for name in changed_names(model)]
    # What is not changed is no argument: it is neither read nor given back.
    assert merge.arguments == sum(v.size * v.dtype.itemsize for v in changed) + adapter
    # A tuple of results holds a pointer to each of them: q, k and v are one, gate and up another.
    made = len(changed) - 3 * len(model.config.decoder.layers)
    assert merge.outputs == sum(v.size * v.dtype.itemsize for v in changed) + 8 * made
    gradients = programs["grpo gradients"].memory
    unused = sum(
        v.size * v.dtype.itemsize
        for name, v in split(model).frozen.items()
        if name.startswith(("vision_tower", "multi_modal_projector"))
    )
    batch = gradients.arguments - 2 * adapter - (base - unused)
    assert 0 < batch < 64 * 1024
    assert gradients.aliased == adapter
    assert found["grpo gradients"].working >= gradients.temporary > 0


def test_what_was_compiled_runs(workload, compiled):
    """The planned program is the real one: it takes real arrays, and its step lowers no loss to NaN."""
    target = open_target(HERE, 1)
    (job,) = (job for job in jobs(workload, target) if job.name == "grpo gradients")
    model = workload.model
    frozen = base_of(model).init(jax.random.key(0))

    def one(x):
        return jnp.zeros(x.shape, x.dtype)

    sums, params, _, batch, recorded, counts, step = (jax.tree.map(one, part) for part in job.arguments)
    counts = {name: jnp.float32(1) for name in counts}
    params = {name: jnp.full_like(value, 0.01) for name, value in params.items()}
    weight = jnp.ones_like(batch.weight)
    # Text: image 0 everywhere would put one feature, zeros, in place of every token, and nothing would have a gradient.
    tokens = jnp.arange(batch.tokens.size, dtype=jnp.int32).reshape(batch.tokens.shape) % 100
    batch = batch._replace(tokens=tokens, image=jnp.full_like(batch.image, -1))
    out, (loss, *_) = compiled["grpo gradients"](
        sums,
        params,
        frozen,
        batch._replace(weight=weight, advantage=jnp.ones_like(batch.advantage)),
        recorded,
        counts,
        step,
    )
    assert np.isfinite(loss)
    assert max(float(jnp.max(jnp.abs(g))) for g in out.values()) > 0


def test_without_the_plug_in_arithmetic_says_so(workload, monkeypatch):
    monkeypatch.setattr("vlmalign.planning.target.PLUG_INS", (("no-such-wheel",),))
    target = open_target(find_device("h100"), 2)
    assert not target.devices
    said = []
    plan = make_plan(workload, target, search=True, say=said.append)
    assert f"pip install no-such-wheel=={jax.__version__}" in said[0]
    assert plan.programs == {}
    assert {phase.how for phase in plan.now.phases} == {"arithmetic"}
    assert plan.better is not None


def test_without_an_assembler_arithmetic_says_so(monkeypatch):
    """The plug-in alone describes a GPU, but every kernel fails to compile where NVIDIA's assembler is not."""

    def fail(self, **options):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: No PTX compilation provider is available.\n - ptxas_path: none")

    monkeypatch.setattr("vlmalign.planning.target.plug_in_problem", lambda: None)
    monkeypatch.setattr("vlmalign.planning.target._versions", lambda names: dict.fromkeys(names, jax.__version__))
    monkeypatch.setattr(topologies, "get_topology_desc", lambda **described: SimpleNamespace(devices=jax.devices()))
    assert open_target(find_device("h100"), 1).refusal is None
    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    target = open_target(find_device("h100"), 1)
    assert not target.devices
    assert target.refusal == (
        "XLA makes no kernels here (UNAVAILABLE: No PTX compilation provider is available.); "
        "NVIDIA's assembler and functions come with: pip install nvidia-cuda-nvcc-cu12"
    )


def test_files_of_kernels_serve_one_compilation_at_a_time():
    files = KernelFiles()
    with files.borrowed() as first, files.borrowed() as second:
        assert first != second
        assert not first.exists(), "XLA makes it: an empty file would be none of its own"
        first.write_bytes(b"kernel")
    with files.borrowed() as again:
        assert again in (first, second)
    with pytest.raises(RuntimeError, match="inside"), files.borrowed():
        raise RuntimeError("inside")
    with files.borrowed() as one, files.borrowed() as other:
        assert {one, other} == {first, second}
    folder = first.parent
    del files
    gc.collect()
    assert not folder.exists()


@needs_plug_in
def test_a_kernel_is_made_once_for_several_programs():
    target = open_target(find_device("h100"), 1)
    x = jax.ShapeDtypeStruct((256,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(target.devices[0]))
    jobs = [Job(name, lambda x: jnp.sin(x) + 1, (x,)) for name in ("first", "second")]
    sizes = []
    for job in jobs:
        compile_all([job], target, lambda text: None)
        with target.kernels.borrowed() as file:
            sizes.append(file.stat().st_size)
    assert sizes[0] == sizes[1] > 0


def test_counts(workload):
    with pytest.raises(ValueError, match="count must be >= 1 device, found 0"):
        open_target(find_device("h100"), 0)
    with pytest.raises(ValueError, match="only 1 devices are here"):
        open_target(HERE, 2)


def test_asking_for_devices_hears_of_the_described_ones_only_while_tracing():
    here, described = jax.devices(), jax.devices()[:1] * 3
    target = Target(find_device("h100"), 1, tuple(described))

    def fail() -> None:
        with tracing(target):
            assert jax.devices() == described
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert jax.devices() == here


@needs_plug_in
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_every_device_compiles(device):
    target = open_target(device, 1)
    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(target.devices[0]))
    with tracing(target):
        lowered = jax.jit(lambda a: a @ a).trace(x).lower()
    assert lowered.compile(compiler_options=target.options).memory_analysis().argument_size_in_bytes == 2 * 256 * 256


@needs_plug_in
def test_eight_gpus_reduce_the_adapters_gradients_and_nothing_else(tmp_path):
    """Collectives of the real training step on a described A100 x 8; cuDNN's attention in the tower, as there."""
    workload = small_workload(tmp_path, "stages.base.dtype=bfloat16", count=8)
    target = open_target(find_device("a100-80"), 8)
    plan = make_plan(workload, target, search=False, say=lambda text: None)
    reduced = plan.programs["grpo gradients"].findings.collectives
    assert {each.kind for each in reduced} == {"all-reduce"}
    assert {each.loop for each in reduced} == {""}
    # In float32, although the adapter is used in bfloat16 (`models.product`); beside a few metrics.
    adapter = 4 * adapter_weights(workload.model)
    assert adapter <= sum(each.bytes for each in reduced) <= adapter + 1024
    for name in ("encode", "merge", "grpo prefill", "grpo decode", "grpo reference", "grpo optimiser"):
        assert plan.programs[name].findings.collectives == (), name
    assert plan.programs["encode"].findings.calls["__cudnn$fmhaSoftmax"] == workload.model.config.vision.layers
    assert plan.now.peak.peak <= usable(target.device.memory)
