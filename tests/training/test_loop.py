"""The train loop: a stage stopped anywhere and started again ends with the same bits and the same metrics file."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_checkpoints import QUICK

from vlmalign import stopping
from vlmalign.models.config import DecoderConfig, LayerSpec, ModelConfig, Rope
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.progress import Progress
from vlmalign.training.best import Best
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.loop import Stage, train
from vlmalign.training.optimiser import OPTIMISERS, OptimiserSettings, build_optimiser, learning_rate
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.training.supervised import Shapes, SupervisedSource, micro_batches
from vlmalign.types import Group, Segment

STEPS = 6


@pytest.fixture(scope="module")
def model() -> Model:
    """One layer, 16 wide, with an adapter."""
    decoder = DecoderConfig(
        vocab=40, embed=16, ffn=32, heads=2, kv_heads=1, head_dim=8, layers=(LayerSpec(Rope(10_000.0), None),),
        norm_eps=1e-6, norm_offset=1.0, sandwich_norm=True, qk_norm=True, qkv_bias=False, out_bias=False, ffn_bias=False,
        activation="gelu_tanh", query_scale=8**-0.5, embed_scale=4.0, tied_head=True,
    )  # fmt: skip
    return Model(ModelConfig("gemma3", decoder, None, None), lora=LoraSpec(rank=2, alpha=4))


@pytest.fixture(scope="module")
def base(model: Model) -> dict:
    return model.without_lora().init(jax.random.key(0))


@pytest.fixture(scope="module")
def trainer(model: Model) -> Trainer:
    settings = OptimiserSettings(1e-2)
    with patch.object(jax, "jit", partial(jax.jit, compiler_options=QUICK)):
        return Trainer(model, Objective("sft", sft_loss, sft_counts), build_optimiser(settings, STEPS))


def examples(count: int = 12) -> list[Group]:
    rng = np.random.default_rng(0)

    def segment(length: int, weight: float) -> Segment:
        tokens = rng.integers(1, 40, length).astype(np.int32)
        return Segment(tokens, np.full(length, -1, np.int32), np.full(length, weight, np.float32))

    return [Group(i, segment(3 + i % 3, 0.0), (segment(4 + i % 4, 1.0),), ()) for i in range(count)]


def run_stage(folder, trainer, model, base, *, source=None, evaluate=None, checkpoint_every=2, **more):
    source = source or new_source()
    stage = Stage("sft", folder, STEPS, checkpoint_every, learning_rate(OptimiserSettings(1e-2), STEPS), **more)
    adapter = init_adapter(model.shapes, {}, key=jax.random.key(1))
    return train(stage, trainer, adapter, base, source, Progress(), evaluate)


def new_source() -> SupervisedSource:
    return SupervisedSource(
        examples(), batch=4, shapes=Shapes(rows=2, prompt_multiple=8, completion_multiple=8), features=None, seed=3
    )


class Interrupted(Exception):
    """Stands for whatever ends a process."""


class StopAt:
    """A source that dies before update number `step`."""

    waits = False

    def __init__(self, step: int):
        self.inner, self.step = new_source(), step

    def work(self, step, params):
        if step == self.step:
            raise Interrupted
        return self.inner.work(step, params)

    def observe(self, line):
        self.inner.observe(line)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trainer, model, base):
    folder = tmp_path_factory.mktemp("whole")
    return run_stage(folder, trainer, model, base), (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stop", [1, 5, *(pytest.param(stop, marks=pytest.mark.full) for stop in (3, 4))])
def test_interrupted_stage_continues_bit_for_bit(tmp_path, trainer, model, base, whole, stop):
    with pytest.raises(Interrupted):
        run_stage(tmp_path, trainer, model, base, source=StopAt(stop), checkpoint_every=3)
    # A line is written while the device is at the next step, or before a checkpoint. Those of steps after the last
    # checkpoint are there now and must not be there twice.
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == (stop if stop == 3 else stop - 1)
    params = run_stage(tmp_path, trainer, model, base, checkpoint_every=3)
    expected, metrics = whole
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    for name, value in expected.items():
        assert np.array_equal(params[name], value), name


def test_finished_stage_does_no_work(tmp_path, trainer, model, base, whole):
    run_stage(tmp_path, trainer, model, base)
    params = run_stage(tmp_path, trainer, model, base, source=StopAt(0))
    assert all(np.array_equal(params[name], value) for name, value in whole[0].items())


def test_checkpoint_of_another_adapter_is_refused(tmp_path, trainer, model, base):
    run_stage(tmp_path, trainer, model, base)
    other = replace(model, lora=LoraSpec(rank=3, alpha=4))
    settings = OptimiserSettings(1e-2)
    changed = Trainer(other, Objective("sft", sft_loss, sft_counts), build_optimiser(settings, STEPS))
    with pytest.raises(ValueError, match="lora_A"):
        run_stage(tmp_path, changed, other, base)


def test_half_written_checkpoint_is_not_seen(tmp_path, trainer, model):
    """What a kill in the middle of a save leaves behind has another name than a whole checkpoint."""
    state = trainer.init(init_adapter(model.shapes, {}, key=jax.random.key(1)))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"metrics": 0})
    (tmp_path / "7.orbax-checkpoint-tmp").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert int(checkpoints.restore(state).state.step) == 0


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


DAMAGE = {
    "one bit": lambda folder: flip(largest(folder)),
    "cut": lambda folder: os.truncate(largest(folder), largest(folder).stat().st_size // 2),
    "zeroed": lambda folder: largest(folder).write_bytes(bytes(largest(folder).stat().st_size)),
    "file gone": lambda folder: largest(folder).unlink(),
    "part gone": lambda folder: shutil.rmtree(folder / "shapes"),
    "state gone": lambda folder: shutil.rmtree(folder / "state"),
    "position emptied": lambda folder: (folder / "position" / "metadata").write_text("{}"),
    "record gone": lambda folder: (folder / "files.json").unlink(),
    "record torn": lambda folder: (folder / "files.json").write_text("[["),
    "empty": lambda folder: [shutil.rmtree(folder), folder.mkdir()],
}


@pytest.mark.parametrize(
    "damage",
    [
        damage if damage in ("one bit", "cut", "part gone") else pytest.param(damage, marks=pytest.mark.full)
        for damage in DAMAGE
    ],
)
def test_a_damaged_checkpoint_is_left_out_for_the_one_before(tmp_path, trainer, model, base, whole, damage, capfd):
    with pytest.raises(Interrupted):
        run_stage(tmp_path, trainer, model, base, source=StopAt(5))
    DAMAGE[damage](tmp_path / "checkpoints" / "4")
    params = run_stage(tmp_path, trainer, model, base)
    said = capfd.readouterr().out
    assert re.search(rf"the checkpoint of update 4 is left out: {tmp_path}/checkpoints/4/\S+ is", said)
    assert "going on from that of update 2" in said
    assert "sft: continuing after update 2 of 6" in said
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole[1]
    for name, value in whole[0].items():
        assert np.array_equal(params[name], value), name
    assert [path.name for path in (tmp_path / "checkpoints" / "damaged").iterdir()] == ["4-0"], "it is kept"


def test_only_damaged_checkpoints_are_an_error(tmp_path, trainer, model, base):
    with pytest.raises(Interrupted):
        run_stage(tmp_path, trainer, model, base, source=StopAt(5))
    for step in ("2", "4"):
        flip(largest(tmp_path / "checkpoints" / step))
    with pytest.raises(ValueError, match=r"no checkpoint in \S+ is whole: \S+/4/\S+ is not as it was written; \S+/2/"):
        run_stage(tmp_path, trainer, model, base)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "4"], "nothing is moved"


@pytest.mark.parametrize("damage", ["gone", "one bit"])
@pytest.mark.parametrize("stop", [None, 4])
def test_a_best_state_that_is_lost_is_an_error(tmp_path, trainer, model, base, damage, stop):
    """Of a finished stage, and of one under way before it goes on; the last state is never taken for it."""
    if stop is None:
        best_stage(tmp_path, trainer, model, base, Losses(CURVE))
    else:
        with pytest.raises(Interrupted):
            best_stage(tmp_path, trainer, model, base, Losses(CURVE), source=StopAt(stop))
    if damage == "gone":
        shutil.rmtree(tmp_path / "best")
    else:
        flip(largest(tmp_path / "best"))
    step = 5 if stop is None else 2
    with pytest.raises(ValueError, match=rf"the best state so far, of update {step}, is lost: \S+/best/{step}\S* is"):
        best_stage(tmp_path, trainer, model, base, Losses(CURVE))


def test_a_stage_that_is_told_to_end_saves_and_goes_on_to_the_same_bits(tmp_path, trainer, model, base, whole):
    """After any update: also where no checkpoint was due."""
    for done in (1, 3, 5):
        folder = tmp_path / str(done)
        calls = iter(range(1, STEPS + 1))
        with (
            patch.object(stopping, "requested", lambda calls=calls, done=done: next(calls) == done),
            pytest.raises(stopping.Stopped, match=f"sft was saved after update {done} of 6"),
        ):
            run_stage(folder, trainer, model, base, checkpoint_every=4)
        assert (folder / "checkpoints" / str(done)).is_dir()
        params = run_stage(folder, trainer, model, base, checkpoint_every=4)
        assert (folder / "metrics.jsonl").read_bytes() == whole[1]
        for name, value in whole[0].items():
            assert np.array_equal(params[name], value), name


def test_a_checkpoint_that_would_fill_the_disk_is_not_begun(tmp_path, trainer, model, base, whole):
    """What was saved before stands, and with room again the stage goes on to the same bits."""
    real = shutil.disk_usage

    def little(folder):
        return real(folder)._replace(free=1000 if (tmp_path / "checkpoints" / "2").exists() else 10**9)

    with (
        patch.object(shutil, "disk_usage", little),
        pytest.raises(
            OSError, match=r"no space for the checkpoint of update 4: it needs about \S+ MiB, and 0.0 MiB are free"
        ),
    ):
        run_stage(tmp_path, trainer, model, base)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    run_stage(tmp_path, trainer, model, base)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole[1]


def test_a_stage_that_is_another_s_now_writes_nothing_more(tmp_path, trainer, model, base):
    def check():
        if (tmp_path / "checkpoints" / "2").exists():
            raise ValueError("taken over")

    with pytest.raises(ValueError, match="taken over"):
        run_stage(tmp_path, trainer, model, base, check=check)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    assert len(lines(tmp_path)) == 2


def test_learning_rate_schedule_by_hand():
    """10 steps, 20 % warm-up: half the peak, the peak, then down to 0 at the end."""
    settings = OptimiserSettings(1.0, schedule="linear", warmup=0.2)
    rate = learning_rate(settings, 10)
    assert [round(float(rate(i)), 4) for i in range(10)] == [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]


def test_learning_rate_cosine_ends_at_zero():
    rate = learning_rate(OptimiserSettings(1.0, warmup=0.0), 100)
    assert float(rate(0)) == pytest.approx(1.0)
    assert float(rate(100)) == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(ValueError, match="schedule must be one of"):
        learning_rate(OptimiserSettings(1.0, schedule="step"), 10)


def test_weight_decay_and_clipping_are_optax(trainer):
    """A huge gradient moves parameters as one of norm 1 does."""
    optimiser = build_optimiser(
        OptimiserSettings(1e-2, weight_decay=0.0, clip_norm=1.0, schedule="constant", warmup=0), 4
    )
    params = {"a": jnp.ones(3)}
    big, small = ({"a": jnp.full(3, size)} for size in (1e6, 1 / np.sqrt(3)))
    moved = [optimiser.update(g, optimiser.init(params), params)[0]["a"] for g in (big, small)]
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5)
    assert isinstance(optimiser, optax.GradientTransformation)


@pytest.mark.parametrize("name", OPTIMISERS)
def test_only_matrices_decay(name):
    """Without a gradient, a matrix shrinks and a vector stands."""
    optimiser = build_optimiser(OptimiserSettings(0.1, name=name, weight_decay=0.5, schedule="constant", warmup=0), 4)
    params = {"matrix": jnp.ones((2, 3)), "vector": jnp.ones(3)}
    updates, _ = optimiser.update(jax.tree.map(jnp.zeros_like, params), optimiser.init(params), params)
    assert (updates["matrix"] < 0).all()
    assert not updates["vector"].any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"name": "adam"}, "optimiser must be one of"), ({"warmup": 2.0}, "share of all steps")],
)
def test_wrong_optimiser_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimiserSettings(1e-3, **settings)


# ------------------------------------------------------------------------------------- gradients that are not finite


class Poison:
    """The weights of some steps' tokens are so large that their sum overflows."""

    waits = False

    def __init__(self, steps):
        self.inner, self.steps = new_source(), steps

    def work(self, step, params):
        work = self.inner.work(step, params)
        if step not in self.steps:
            return work
        batches = [
            b._replace(groups=b.groups._replace(weight=b.groups.weight * np.float32(1e38))) for b in work.batches
        ]
        return work._replace(batches=batches)

    def observe(self, line):
        self.inner.observe(line)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_gradient_that_is_not_finite_changes_nothing(trainer, model, base):
    state = trainer.init(init_adapter(model.shapes, {}, key=jax.random.key(1)))
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, found = trainer.step(state, base, Poison({0}).work(0, {}).batches)
    assert bool(found.skipped)
    assert int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, (state.params, state.opt_state)), before)


def test_skipped_steps_are_counted_and_too_many_end_the_stage(tmp_path, trainer, model, base):
    params = run_stage(tmp_path / "one", trainer, model, base, source=Poison({1, 4}))
    assert [line["skipped"] for line in lines(tmp_path / "one")] == [0, 1, 0, 0, 1, 0]
    source = new_source()
    ids = [sorted(source.work(step, {}).ids) for step in range(6)]
    assert [line.get("groups") for line in lines(tmp_path / "one")] == [None, ids[1], None, None, ids[4], None]
    assert all(np.isfinite(value).all() for value in params.values())
    with pytest.raises(ValueError, match="2 steps in a row up to step 4 were not finite"):
        run_stage(tmp_path / "two", trainer, model, base, source=Poison({2, 3}), max_skipped=2)
    # What was saved before stands, and the count of steps in a row is part of it.
    with pytest.raises(ValueError, match="2 steps in a row up to step 4"):
        run_stage(tmp_path / "two", trainer, model, base, source=Poison({2, 3}), max_skipped=2)


# ---------------------------------------------------------------------------------------------------- the best state


class Losses:
    """An evaluation with given results; remembers what it was called with."""

    def __init__(self, values):
        self.values, self.seen = values, {}

    def __call__(self, step, params):
        self.seen[step] = jax.tree.map(np.asarray, params)
        return {"validation/loss": self.values[step]}


CURVE = {1: 3.0, 2: 1.0, 3: 2.0, 4: float("nan"), 5: 0.5, 6: 4.0}


def best_stage(folder, trainer, model, base, evaluate, *, source=None, **rule):
    return run_stage(
        folder, trainer, model, base, source=source, evaluate=evaluate, evaluate_every=1, best=Best(**rule)
    )


@pytest.mark.parametrize(
    ("rule", "best", "last"),
    [
        ({}, 5, 6),
        ({"patience": 2}, 2, 4),
        pytest.param({"patience": 3}, 5, 6, marks=pytest.mark.full),
        pytest.param({"mode": "max"}, 6, 6, marks=pytest.mark.full),
        ({"mode": "max", "patience": 1}, 1, 2),
    ],
)
def test_best_evaluation_is_returned(tmp_path, trainer, model, base, rule, best, last):
    evaluate = Losses(CURVE)
    params = best_stage(tmp_path, trainer, model, base, evaluate, **rule)
    assert max(evaluate.seen) == last, "where the stage ended"
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), evaluate.seen[best])
    again = best_stage(tmp_path, trainer, model, base, Losses({}), **rule)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, again), evaluate.seen[best])


@pytest.mark.parametrize("stop", [3, *(pytest.param(stop, marks=pytest.mark.full) for stop in (1, 5))])
def test_interrupted_search_ends_the_same(tmp_path, trainer, model, base, stop):
    """Checkpoints come every two steps, so a best state may be newer than the checkpoint that is gone back to."""
    evaluate = Losses(CURVE)
    with pytest.raises(Interrupted):
        best_stage(tmp_path, trainer, model, base, Losses(CURVE), source=StopAt(stop), patience=3)
    params = best_stage(tmp_path, trainer, model, base, evaluate, patience=3)
    jax.tree.map(np.testing.assert_array_equal, jax.tree.map(np.asarray, params), evaluate.seen[5])
    assert [line["validation/loss"] for line in lines(tmp_path)] == [3.0, 1.0, 2.0, None, 0.5, 4.0]


def test_wrong_names_of_evaluations(tmp_path, trainer, model, base):
    with pytest.raises(ValueError, match="no evaluation is called 'f1'; there are: validation/loss"):
        best_stage(tmp_path, trainer, model, base, Losses(CURVE), metric="f1")
    with pytest.raises(ValueError, match="mode min or max"):
        Best(mode="lowest")
    with pytest.raises(ValueError, match="needs a function"):
        run_stage(tmp_path, trainer, model, base, evaluate_every=2)


def test_evaluation_is_the_objective_without_an_update(trainer, model, base):
    """Loss tokens of all batches together, whatever the batches."""
    params = init_adapter(model.shapes, {}, key=jax.random.key(1))
    found = []
    for rows in (2, 4):
        shapes = Shapes(rows=rows, prompt_multiple=8, completion_multiple=8)
        batches = [MicroBatch(b, {}) for b in micro_batches(examples(), shapes, None)]
        total, count = trainer.evaluate(params, base, batches)["loss"]
        assert count == sum(len(g.continuations[0]) for g in examples())
        found.append(float(total / count))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


# ------------------------------------------------------------------------------------------------------ token budget


@pytest.mark.parametrize(("tokens", "rows"), [(None, 4), (1000, 4), (64, 4), (63, 2), (16, 1), (1, 1)])
def test_rows_under_a_token_budget(tokens, rows):
    """Rows of 8 + 8 tokens: the largest power of two of them within the budget, one at least."""
    shapes = Shapes(rows=4, tokens=tokens, prompt_multiple=8, completion_multiple=8)
    batches = micro_batches(examples(), shapes, None)
    assert {b.tokens.shape for b in batches} == {(rows, 16)}
    assert sorted(i for b in batches for i in b.group_id.tolist() if i >= 0) == list(range(12))
