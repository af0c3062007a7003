"""Programs drawn out from shallow ones: what is linear in the layers comes out exactly, and the real thing closely."""

from dataclasses import replace
from unittest.mock import Mock

import jax
import pytest
from small_plan import SMALL, small_workload
from tiny_checkpoints import QUICK

from vlmalign.planning.batches import places
from vlmalign.planning.depth import DEPTHS, depths_of, draw_out, shallow, shallow_jobs
from vlmalign.planning.devices import THIS, Device
from vlmalign.planning.hlo import Findings, Traffic
from vlmalign.planning.jobs import Job, micro_job
from vlmalign.planning.programs import Memory, Program, lower, read_compiled
from vlmalign.planning.search import Candidate, _compiled, choose_rows
from vlmalign.planning.target import Target, open_target

HERE = Device(THIS, "this", 16 << 30, 1e10, {"float32": 1e11, "bfloat16": 1e11})


def deep(layers: int) -> dict:
    text = SMALL["text_config"] | {"num_hidden_layers": layers, "layer_types": ["full_attention"] * layers}
    return SMALL | {"text_config": text}


def linear(layers: int) -> Program:
    """One whose every number is a constant and so much per layer; one kind of collective is in no layer."""
    gathers = Traffic("all-gather", "", 2 * layers, 100 * layers)
    findings = Findings((gathers, Traffic("all-reduce", "", 1, 8)), (), {"gemm": 7 * layers + 3}, 1)
    return Program("x", Memory(10 + layers, 5, 1000 + 30 * layers, 2 * layers), findings, 1.5)


def test_what_is_linear_is_exact(tmp_path):
    model = small_workload(tmp_path, sizes=deep(9)).model
    found = draw_out("x", [linear(depth) for depth in DEPTHS], model)
    assert found == replace(linear(9), seconds=3.0, how="drawn out from 2 and 4 layers")


def test_a_shallow_model_is_compiled_as_it_is(tmp_path):
    workload = small_workload(tmp_path, sizes=deep(4))
    assert depths_of(workload.model) == (4,)
    target = open_target(HERE, 1)
    where = places(target, workload.model)
    (job,) = shallow_jobs(lambda model: micro_job(model, workload["grpo"], where, target), workload.model)
    assert job.name == "grpo gradients"
    assert draw_out("grpo gradients", [linear(4)], workload.model) == replace(linear(4), name="grpo gradients")


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return small_workload(tmp_path_factory.mktemp("five"), "stages.base.remat=full", sizes=deep(5))


@pytest.mark.full
def test_memory_of_gradients_is_linear_in_the_layers(five):
    """The real training program of five layers, beside what two and four of them say of it."""
    target = open_target(HERE, 1)

    def make(model):
        return micro_job(model, five["grpo"], places(target, model), target)

    def compiled(job):
        return read_compiled(job.name, lower(job, target).compile(compiler_options=QUICK))

    drawn = draw_out("grpo gradients", [compiled(job) for job in shallow_jobs(make, five.model)], five.model)
    whole = compiled(make(five.model)).memory
    # Adapters, sums and batch are arguments, and every byte of them is foreseen; of a tuple's pointers, all but few.
    assert drawn.memory.arguments == whole.arguments
    assert drawn.memory.aliased == whole.aliased
    assert drawn.memory.beyond == pytest.approx(whole.beyond, rel=0.02)
    assert len(shallow(five.model, 2).config.decoder.layers) == 2


def test_what_is_known_is_not_compiled_and_scales_the_others(five, monkeypatch):
    """One program of a policy says of the other rows whether they can fit; only what may fit is compiled."""
    target = open_target(HERE, 1)
    compiled = []

    def stand_in(workload, stage, target):
        compiled.append((workload.model.remat, workload["grpo"].rows))
        return replace(linear(9), memory=Memory(0, 0, 1 << 20, 0))

    monkeypatch.setattr("vlmalign.planning.search._compiled", stand_in)
    huge = replace(linear(9), memory=Memory(0, 0, 1 << 40, 0))
    known, say = {Candidate("none", 2): huge}, [].append
    # Scaled to the huge one, a single row does not fit either, and nothing is compiled.
    choice = choose_rows(five, "grpo", "none", target, say, known=known)
    assert [t.how for t in choice.tried] == ["compiled", "arithmetic scaled to what was compiled"]
    assert (choice.taken, compiled) == (None, [])
    choice = choose_rows(five, "grpo", "full", target, say, known=known)
    assert compiled == [("full", 2)]
    assert choice.taken == Candidate("full", 2)
    assert choice.program is not None


@pytest.mark.parametrize(("platform", "layers"), [("gpu", [5]), ("cpu", [2, 4])])
def test_for_the_gpu_that_is_here_the_very_program_is_compiled(five, monkeypatch, platform, layers):
    """A CPU, where a plan is a rehearsal, is told apart from a GPU that will run what was compiled."""
    compiled = []

    def job(model, update, where, target):
        return Job(update.name, None, (len(model.config.decoder.layers),))

    def stand_in(jobs, target, say):
        compiled.extend(job.arguments[0] for job in jobs)
        return {job.name: linear(job.arguments[0]) for job in jobs}

    monkeypatch.setattr("vlmalign.planning.search.micro_job", job)
    monkeypatch.setattr("vlmalign.planning.search.compile_all", stand_in)
    found = _compiled(five, "grpo", Target(HERE, 1, (Mock(spec=jax.devices()[0], platform=platform),)))
    assert compiled == layers
    assert found.memory == linear(5).memory
    assert found.how == ("compiled" if platform == "gpu" else "drawn out from 2 and 4 layers")
