"""Supervised losses against TRL's own `SFTTrainer.compute_loss`: value and gradient with respect to every token."""

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import assert_close
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput
from trl_preference import Accelerator

from vlmalign.objectives.sft import KINDS, sft_counts, sft_loss
from vlmalign.types import GroupBatch, Scores

RNG = np.random.default_rng(0)
N, C = 4, 6
#: two turns in row 0, padding behind all but row 1, nothing to learn in row 3
WEIGHT = np.array([[1, 1, 0, 0, 1, 0], [1] * 6, [1, 0, 0, 0, 0, 0], [0] * 6], np.float32)[:, None]
LOGP = (-2 * RNG.random((N, 1, C))).astype(np.float32)
ENTROPY = RNG.random((N, 1, C)).astype(np.float32)


def batch_of(weight: np.ndarray) -> GroupBatch:
    n = len(weight)
    return GroupBatch(*(np.zeros((n, 2 + C), np.int32),) * 6, weight=weight, group_id=np.arange(n, dtype=np.int32))


def ours(kind: str, weight=WEIGHT, rows=slice(None), counts=None, logp=LOGP):
    batch = batch_of(weight[rows])
    counts = counts or sft_counts([batch], kind=kind)

    def total(logp):
        parts = sft_loss(Scores(logp=logp, entropy=jnp.asarray(ENTROPY[rows])), batch, kind=kind)
        return parts.sums[kind] / counts[kind], parts.metrics

    (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(logp[rows]))
    return float(value), np.asarray(gradient), jax.tree.map(float, metrics)


def trls(kind: str, num_items: int | None):
    keep = torch.from_numpy(WEIGHT[:, 0] > 0)
    logp = torch.from_numpy(LOGP[:, 0]).requires_grad_()
    output = FusedCausalLMOutput(
        log_probs=torch.where(keep, logp, 0.0),
        entropy=torch.where(keep, torch.from_numpy(ENTROPY[:, 0]), 0.0),
        is_top1=torch.zeros_like(keep),
        label_mask=keep,
    )
    accelerator = Accelerator()
    accelerator.parallelism_config, accelerator.num_processes = None, 1
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(loss_type=kind, average_tokens_across_devices=False, max_length=None),
        accelerator=accelerator,
        aux_loss_enabled=False,
        compute_loss_func=None,
        label_smoother=None,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"labels": keep.long(), "attention_mask": keep.long()}
    loss = SFTTrainer.compute_loss(trainer, lambda **_: output, inputs, num_items_in_batch=num_items)
    loss.backward()
    return loss.item(), logp.grad.numpy()[:, None], trainer._metrics["train"]["entropy"][0]


@pytest.mark.parametrize("num_items", [None, 37], ids=["one micro-batch", "count of a larger batch"])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_trls(kind, num_items):
    value, gradient, metrics = ours(kind, counts=None if num_items is None else {kind: num_items})
    expected, slope, entropy = trls(kind, num_items)
    assert_close(value, expected, 1e-6)
    assert_close(gradient, slope, 1e-6)
    assert_close(metrics["entropy"][0] / metrics["entropy"][1], entropy, 1e-6)
    assert metrics["loss"][1] == WEIGHT.sum()


def test_every_kind_of_trl_is_here():
    choices = SFTConfig.__dataclass_fields__["loss_type"].metadata["choices"]
    assert set(choices) - {"chunked_nll"} == set(KINDS)  # TRL's old name of nll
    with pytest.raises(ValueError, match="nll, dft"):
        sft_counts([], kind="dtf")


@pytest.mark.parametrize("kind", KINDS)
def test_turns_weigh_above_and_below_and_cuts_add_up(kind):
    weight = WEIGHT.copy()
    weight[0, 0, :2], weight[1] = 0.5, 2.0
    factor = np.exp(LOGP) if kind == "dft" else 1.0
    value, gradient, _ = ours(kind, weight)
    assert_close(value, -(weight * factor * LOGP).sum() / weight.sum(), 1e-6)
    assert_close(gradient, -weight * factor / weight.sum(), 1e-6)
    for size in (1, 2):
        cuts = [slice(i, i + size) for i in range(0, N, size)]
        counts = sft_counts([batch_of(weight[rows]) for rows in cuts], kind=kind)
        parts = [ours(kind, weight, rows, counts) for rows in cuts]
        assert_close(sum(p[0] for p in parts), value, 1e-6)
        assert_close(np.concatenate([p[1] for p in parts]), gradient, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_on_padding_does_not_matter(kind):
    spoilt = np.where(WEIGHT > 0, LOGP, -np.inf).astype(np.float32)
    (value, gradient, metrics), expected = ours(kind, logp=spoilt), ours(kind)
    assert value == expected[0]
    assert np.array_equal(gradient, expected[1])
    assert metrics == expected[2]
