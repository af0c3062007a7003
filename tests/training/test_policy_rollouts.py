"""What a policy's rollout says of itself: its cost, programs compiled ahead, films announced, and a copy that is stale."""

from __future__ import annotations

import logging
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_checkpoints import adapted, group, pictures, vlm

from vlmalign.models.lora import is_adapter
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.merge_check import ANOTHER_POLICY, MORE_THAN_ROUNDING, judge_gap
from vlmalign.rollout.sampling import Sampling
from vlmalign.training.policy import PolicySource
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import Task
from vlmalign.training.step import Objective, Trainer
from vlmalign.training.supervised import Shapes
from vlmalign.types import Grid

GRPO = GrpoSettings(max_completion=5)
PROMPTS = [group(1, [5, "a", 6]), group(2, [8, "b", 9]), group(3, [7, "a", "b", 3]), group(4, [2, "c"])]


class Reader:
    def grid(self, key):
        return Grid(1, 4)

    def read(self, keys):
        return list(pictures(keys))


@cache
def trainer() -> Trainer:
    objective = Objective("grpo", partial(grpo_loss, settings=GRPO), partial(grpo_counts, settings=GRPO))
    return Trainer(adapted().model, objective, optax.sgd(0.1))


def adapter() -> dict[str, jax.Array]:
    return {name: jnp.array(value) for name, value in adapted().params.items() if is_adapter(name)}


def source(announced: list[str], **options) -> PolicySource:
    features = FeatureStore(vlm().model, vlm().params, Reader(), chunk=2, announce=announced.extend)
    generator = Generator(
        vlm().model, features, (1,), rows=2, group=2, completion=5, sampling=Sampling(), multiple=8, images=2,
        prompt_lengths=(16,),
    )  # fmt: skip
    return PolicySource(
        [Task(prompt, "", {}) for prompt in PROMPTS],
        generator=generator,
        trainer=trainer(),
        base=vlm().params,
        decode=str,
        score=lambda number, keys, *rest: ScoredBatch([float(prompt + sample) for prompt, sample in keys], {}, ()),
        shapes=Shapes(rows=4, prompt_multiple=16, completion_multiple=5, images=2),
        settings=RolloutSettings(4, seed=3),
        **options,
    )


def one_step(own: PolicySource) -> dict:
    """The line that the loop would write of the first update."""
    params = adapter()
    work = own.work(0, params)
    _, found = trainer().step(trainer().init(params), vlm().params, work.batches, work.options)
    parts = {name: float(total) / float(count) for name, (total, count) in found.parts.items()}
    return {"step": 1, **work.metrics, **parts}


@pytest.mark.full
def test_the_line_says_what_sampling_cost_and_how_true_the_copy_is(caplog):
    announced: list[str] = []
    own = source(announced)
    line = one_step(own)
    assert 0 < line["decoded_used"] <= 1
    assert line["prefill_used"] == pytest.approx(sum(len(p.prompt) for p in PROMPTS) / (4 * 16))
    assert line["cache_moves"] == 0
    assert line["rollout_gap"] < 1e-5
    with caplog.at_level(logging.WARNING):
        own.observe(line)
    assert not caplog.records
    assert {"a", "b", "c"} <= set(announced), "films are announced before they are read"
    assert own._generator.features.encoded == 3


@pytest.mark.full
def test_a_stale_copy_is_told_and_a_wrong_one_stops(caplog):
    """Matrices a hundredth off, as after an update that was missed; and the base alone, as if nothing had been merged."""
    own = source([], bring=lambda merged: {n: v * (1.01 if v.ndim == 2 else 1.0) for n, v in merged.items()})
    line = one_step(own)
    assert MORE_THAN_ROUNDING["float32"] < line["rollout_gap"] < ANOTHER_POLICY
    with caplog.at_level(logging.WARNING):
        own.observe(line)
        own.observe(line)
    assert len(caplog.records) == 1, "said once"
    assert "more than rounding in float32" in caplog.text
    other = source([], bring=lambda merged: {**merged, **vlm().params})
    with pytest.raises(ValueError, match="sampled from another policy than the one that is trained"):
        other.observe(one_step(other))


def test_gaps_are_judged_by_dtype():
    assert judge_gap(0.01, "bfloat16") is None
    assert "0.01 nat per token" in judge_gap(0.01, "float32")
    assert judge_gap(1e-6, "float32") is None
    assert judge_gap(np.nan, "float32") is None
    with pytest.raises(ValueError, match="stale or wrong"):
        judge_gap(0.6, "bfloat16")
