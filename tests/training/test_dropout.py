"""Dropout of adapters: masks follow from what a token is, so padding and cutting a batch change nothing."""

from __future__ import annotations

import itertools
from functools import cache, partial
from unittest.mock import patch

import jax
import numpy as np
import optax
import pytest
from tiny_checkpoints import QUICK, assert_close, group, put, random_adapter, read, text_model, write

from vlmalign.models.dropout import keep_mask, token_noise
from vlmalign.models.lora import LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.training.step import MicroBatch, Objective, Trainer, token_scores
from vlmalign.types import Layout

RNG = np.random.default_rng(0)
GROUPS = [group(i, RNG.integers(3, 90, 3 + i % 5).tolist(), RNG.integers(3, 90, 1 + i % 6).tolist()) for i in range(8)]
LAYOUT, WIDER = Layout(8, 1, 6), Layout(12, 1, 9)
RATE = 0.1


@cache
def base():
    module = text_model(5, num_hidden_layers=1, layer_types=["sliding_attention"])
    return read(write(module, "one-layer-dropout"), module)


@cache
def model(rate: float = RATE) -> Model:
    return Model(base().model.config, lora=LoraSpec(rank=2, alpha=4.0, dropout=rate))


@cache
def trainer(rate: float = RATE, seed: int = 0) -> Trainer:
    objective = Objective("sft", sft_loss, sft_counts, dropout=True)
    with patch.object(jax, "jit", partial(jax.jit, compiler_options=QUICK)):
        return Trainer(model(rate), objective, optax.sgd(1.0), seed=seed)


def updated(cut: list[list], layout: Layout, rows: int, *, rate: float = RATE, seed: int = 0, step: int = 0):
    """The adapter after one SGD step, and the loss."""
    own = trainer(rate, seed)
    state = own.init(random_adapter(model(), seed=1))._replace(step=np.int32(step))
    batches = [MicroBatch(put(part, layout, rows=rows, images=None), {}) for part in cut]
    state, found = own.step(state, base().params, batches)
    return state.params, float(found.loss)


@pytest.fixture(scope="module")
def whole():
    return updated([GROUPS], LAYOUT, 8)


@pytest.mark.full
@pytest.mark.parametrize(
    ("cut", "layout", "rows"),
    [
        pytest.param([[g] for g in GROUPS], LAYOUT, 1, id="8x1"),
        pytest.param([GROUPS[i : i + 2] for i in range(0, 8, 2)][::-1], LAYOUT, 2, id="4x2"),
        pytest.param([GROUPS[:5], GROUPS[5:]], WIDER, 5, id="uneven, wider"),
    ],
)
def test_cutting_and_padding_change_nothing(whole, cut, layout, rows):
    params, loss = updated(cut, layout, rows)
    assert loss == pytest.approx(whole[1], rel=1e-5)
    for name, value in params.items():
        assert_close(value, whole[0][name], 1e-5, name)


@pytest.mark.full
def test_it_drops_and_is_drawn_anew(whole):
    plain, another, seeded = (
        updated([GROUPS], LAYOUT, 8, **change)[1] for change in ({"rate": 0.0}, {"step": 1}, {"seed": 1})
    )
    assert len({round(x, 4) for x in (whole[1], plain, another, seeded)}) == 4


def test_other_scores_are_taken_without():
    """Evaluation and references of a model with a rate equal those of one without."""
    params = random_adapter(model(), seed=1)
    batch = put(GROUPS, LAYOUT, images=None)
    found = [trainer(rate).scores(params, base().params, batch).logp for rate in (RATE, 0.0)]
    assert np.array_equal(*found)


def test_masks_keep_the_right_share_and_scale():
    """Independent over tokens, modules, layers and inputs; the mean of a kept and scaled input is the input."""
    batch = put(GROUPS, LAYOUT, images=None)
    noise = token_noise(jax.random.key(3), batch, 0.25, size=500)
    places = [("self_attn.q_proj", 0), ("self_attn.k_proj", 0), ("self_attn.q_proj", 1), ("mlp.down_proj", 33)]
    masks = [np.asarray(keep_mask(noise._replace(layer=layer), name, 400)) for name, layer in places]
    real = np.asarray(batch.segment) >= 0
    count = real.sum() * 400
    for mask in masks:
        assert abs(mask[real].mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / count)
    for first, second in itertools.combinations(masks, 2):
        assert abs((first == second)[real].mean() - (0.75**2 + 0.25**2)) < 0.01
    first = masks[0]
    # Neighbours too: in the same row, and the same input of one token and the next. Sums over a token's inputs and over
    # an input's tokens vary as those of independent draws do.
    rows = first[real]
    assert abs((rows[:, 1:] == rows[:, :-1]).mean() - (0.75**2 + 0.25**2)) < 0.01
    assert abs((rows[1:] == rows[:-1]).mean() - (0.75**2 + 0.25**2)) < 0.01
    for axis in (0, 1):
        varies = rows.sum(axis).var() / (rows.shape[axis] * 0.25 * 0.75)
        assert abs(varies - 1) < 5 * np.sqrt(2 / rows.shape[1 - axis])
    assert len({row.tobytes() for row in rows}) == len(rows), "no two tokens share a mask"


@pytest.mark.full
def test_expectation_of_the_adapter():
    """Averaged over 400 masks, the adapted logits of the first token come near those without dropout."""
    batch = put(GROUPS[:1], Layout(8, 1, 6), images=None)
    small = {n: v * (0.05 if "lora_B" in n else 1.0) for n, v in random_adapter(model(), seed=1).items()}
    assert all(map(is_adapter, small))
    params = {**base().params, **small}

    def first(key, batch):
        return token_scores(model(), params, batch, 1.0, key).logp[0, 0, 0]

    many = jax.jit(jax.vmap(first, (0, None)), compiler_options=QUICK)
    draws = np.asarray(many(jax.random.split(jax.random.key(0), 400), batch))
    plain = float(trainer().scores(small, base().params, batch).logp[0, 0, 0])
    assert draws.std() > 0
    assert abs(draws.mean() - plain) < 5 * draws.std() / 20 + 1e-3
