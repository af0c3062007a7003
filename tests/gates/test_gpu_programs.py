"""What stands in the programs of MedGemma-4B compiled for GPUs that are not here: two of its layers, in full width.

The whole model's memory against its limits is `scripts/bench/aot.py`, whose figures are in `scripts/bench/results`.
"""

from dataclasses import replace

import pytest
from small_gates import grpo_of

from vlmalign.planning.batches import base_of, places, whole
from vlmalign.planning.depth import shallow
from vlmalign.planning.devices import find_device
from vlmalign.planning.graphs import launches_per_round
from vlmalign.planning.jobs import micro_job, rollout_jobs
from vlmalign.planning.programs import compile_all, lower, read_compiled
from vlmalign.planning.target import open_target, plug_in_problem
from vlmalign.rollout.engine import BLOCK

PROBLEM = plug_in_problem()
needs_plug_in = pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))

#: bytes of the smallest projection (k: 1,024 x 2,560 in bfloat16): what counts as a copy of weights
PROJECTION = 1024 * 2560 * 2


@pytest.fixture(scope="module")
def workload():
    settings = [
        "rollout.completion=512",
        "shapes.prompt_multiple=8",
        "shapes.rows=2",
        "rollout.top_p=1.0",
        "objective.beta=0.0",
    ]
    found = grpo_of("medgemma-4b", 456, *(f"stages.grpo.{each}" for each in settings))
    return replace(found, model=shallow(found.model, 2))


@needs_plug_in
@pytest.mark.parametrize("device", ["a100-80", "h100"])
def test_decoding_copies_no_weights_and_is_one_cuda_graph_per_token(workload, device):
    target = open_target(find_device(device), 1)
    where = places(target, workload.model)
    job = rollout_jobs(workload.model, workload["grpo"].rollout, where, target)[1]
    program = compile_all([job], target, lambda text: None)[job.name]
    assert program.launches == ("CommandBuffer",)
    assert [each for each in program.findings.copies if each.bytes >= BLOCK * each.count * PROJECTION] == []
    assert program.findings.sorts == 0
    cache = job.arguments[1]
    assert program.memory.aliased == sum(x.size * x.dtype.itemsize for kv in cache.own for x in kv) + (
        cache.states.size * cache.states.dtype.itemsize
    )


@needs_plug_in
def test_left_alone_the_compiler_would_copy_weights_for_every_token(workload):
    """Of a base that nothing was merged into, whose matrices stand apart: why `models.compiling.DECODING` is there, and
    that the copies would be found."""
    target = open_target(find_device("a100-80"), 1)
    where = places(target, workload.model)
    job = rollout_jobs(workload.model, workload["grpo"].rollout, where, target)[1]
    job = job._replace(arguments=(where.sampled(whole(base_of(workload.model))), *job.arguments[1:]))
    options = {**target.options, "xla_gpu_enable_triton_gemm": False}  # Triton's products read each matrix by itself
    found = read_compiled(job.name, lower(job, target).compile(compiler_options=options)).findings.copies
    assert sum(each.bytes for each in found) > 2 * BLOCK * 100e6, "of two layers, 160 MB each"


@needs_plug_in
def test_the_update_keeps_no_second_copy_of_the_head(workload):
    """Its gradient for the states runs in bfloat16: in float32 the head would be converted for every chunk."""
    target = open_target(find_device("a100-80"), 1)
    job = micro_job(workload.model, workload["grpo"], places(target, workload.model), target)
    text = lower(job, target).compile(compiler_options=target.options).as_text()
    assert "bf16[262208,2560]" in text
    assert "f32[262208,2560]" not in text


def test_launches_are_those_of_the_outermost_loop():
    listing = """000: kCommandBuffer [source | next=001 (1)]
    001: kCopy         [source | sink] kCopy
002: kWhile         [prev=000 (1) | sink]
condition:
    003: kCustomKernel [source | sink] compare
  body:
    000: kCommandBuffer [source | next=005 (1)]
        004: kCublasLtMatmul [source | sink] kCublasLtMatmul
    005: kWhile         [prev=000 (1) | sink]
condition:
        006: kCustomKernel [source | sink] compare
      body:
        000: kCommandBuffer [source | sink]
            007: kCustomKernel [source | sink] halve
    008: kGemm [prev=005 (1) | sink] kGemm
009: kCommandBuffer [prev=002 (1) | sink]
    010: kCopy [source | sink] kCopy
"""
    assert launches_per_round(listing) == ("CommandBuffer", "While", "Gemm")
    with pytest.raises(ValueError, match="found none"):
        launches_per_round("000: kCommandBuffer [source | sink]\n")
