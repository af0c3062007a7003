"""The train loop: a stage stopped anywhere and started again ends with the same bits and the same metrics file."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

from vlmalign.models.config import DecoderConfig, LayerSpec, ModelConfig, Rope
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.progress import Progress
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.loop import Stage, train
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser, learning_rate
from vlmalign.training.step import Objective, Trainer
from vlmalign.training.supervised import Shapes, SupervisedSource
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
    return Trainer(model, Objective("sft", sft_loss, sft_counts), build_optimiser(settings, STEPS))


def examples(count: int = 12) -> list[Group]:
    rng = np.random.default_rng(0)

    def segment(length: int, weight: float) -> Segment:
        tokens = rng.integers(1, 40, length).astype(np.int32)
        return Segment(tokens, np.full(length, -1, np.int32), np.full(length, weight, np.float32))

    return [Group(i, segment(3 + i % 3, 0.0), (segment(4 + i % 4, 1.0),), ()) for i in range(count)]


def run_stage(folder, trainer, model, base, *, source=None, checkpoint_every=2):
    source = source or new_source()
    stage = Stage("sft", folder, STEPS, checkpoint_every, learning_rate(OptimiserSettings(1e-2), STEPS))
    adapter = init_adapter(model.shapes, {}, key=jax.random.key(1))
    return train(stage, trainer, adapter, base, source, Progress())


def new_source() -> SupervisedSource:
    return SupervisedSource(
        examples(), batch=4, shapes=Shapes(rows=2, prompt_multiple=8, completion_multiple=8), features=None, seed=3
    )


class Interrupted(Exception):
    """Stands for whatever ends a process."""


class StopAt:
    """A source that dies before update number `step`."""

    def __init__(self, step: int):
        self.inner, self.step = new_source(), step

    def work(self, step, params):
        if step == self.step:
            raise Interrupted
        return self.inner.work(step, params)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        self.inner.set_state(state)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trainer, model, base):
    folder = tmp_path_factory.mktemp("whole")
    return run_stage(folder, trainer, model, base), (folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_interrupted_stage_continues_bit_for_bit(tmp_path, trainer, model, base, whole, stop):
    with pytest.raises(Interrupted):
        run_stage(tmp_path, trainer, model, base, source=StopAt(stop))
    # Lines of steps after the last checkpoint are there now and must not be there twice.
    assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == stop
    params = run_stage(tmp_path, trainer, model, base)
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
    params = {"a": np.ones(3, np.float32)}
    big, small = ({"a": np.full(3, size, np.float32)} for size in (1e6, 1 / np.sqrt(3)))
    moved = [optimiser.update(g, optimiser.init(params), params)[0]["a"] for g in (big, small)]
    np.testing.assert_allclose(moved[0], moved[1], rtol=1e-5)
    assert isinstance(optimiser, optax.GradientTransformation)
