"""SFT against torch's cross entropy, GRPO against its formula written out again in float64."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import assert_close

from vlmalign.objectives.advantages import group_advantages
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.types import GroupBatch, Scores

N, K, C = 3, 4, 6


def batch_of(weight: np.ndarray, advantage: np.ndarray | None = None, group_id: np.ndarray | None = None) -> GroupBatch:
    """A batch whose model side plays no part: only weights, advantages and the layout count."""
    n, k, c = weight.shape
    empty = np.zeros((n, 2 + k * c), np.int32)
    ids = np.arange(n) if group_id is None else group_id
    return GroupBatch(*(empty,) * 6, weight=weight, group_id=ids.astype(np.int32), advantage=advantage)


def lengths_to_weight(lengths: np.ndarray) -> np.ndarray:
    return (np.arange(C) < lengths[..., None]).astype(np.float32)


RNG = np.random.default_rng(0)
WEIGHT = lengths_to_weight(np.array([[6, 1, 3, 0], [2, 2, 6, 5], [0, 0, 0, 0]]))
LOGP = -RNG.random((N, K, C)).astype(np.float32) * 2
OLD = (LOGP + 0.4 * RNG.normal(size=LOGP.shape)).astype(np.float32)
REF = (LOGP + 0.4 * RNG.normal(size=LOGP.shape)).astype(np.float32)
ENTROPY = RNG.random((N, K, C)).astype(np.float32)
ADVANTAGE = np.array([[1.0, -1.0, 0.5, -0.5], [-2.0, 2.0, 0.7, -0.7], [0, 0, 0, 0]], np.float32)


# ------------------------------------------------------------------------------------------------- SFT


def test_sft_is_torchs_cross_entropy_over_loss_tokens():
    vocab = 20
    z = RNG.normal(size=(N, 1, C, vocab)).astype(np.float32)
    labels = RNG.integers(0, vocab, size=(N, 1, C))
    weight = lengths_to_weight(np.array([[6], [3], [0]]))
    weight[0, 0, :2] = 0.0  # another turn's tokens
    every = np.asarray(jax.nn.log_softmax(z))
    logp = np.take_along_axis(every, labels[..., None], axis=-1)[..., 0]
    batch = batch_of(weight)
    parts = sft_loss(Scores(logp=jnp.asarray(logp), entropy=jnp.zeros_like(logp)), batch)
    masked = np.where(weight > 0, labels, -100)
    expected = torch.nn.functional.cross_entropy(
        torch.from_numpy(z).reshape(-1, vocab), torch.from_numpy(masked).reshape(-1)
    )
    assert sft_counts([batch]) == {"nll": 7.0}
    assert_close(parts.sums["nll"] / sft_counts([batch])["nll"], expected, 1e-6)
    total, count = parts.metrics["loss"]
    assert_close(total / count, expected, 1e-6)


def test_sft_counts_are_over_all_micro_batches():
    whole = batch_of(WEIGHT)
    parts = [batch_of(WEIGHT[i : i + 1]) for i in range(N)]
    assert sft_counts(parts) == sft_counts([whole]) == {"nll": float(WEIGHT.sum())}


def test_sft_gradient_is_minus_weight_and_metrics_give_none():
    def total(logp):
        parts = sft_loss(Scores(logp=logp, entropy=logp), batch_of(WEIGHT))
        return parts.sums["nll"] + 100 * sum(v for pair in parts.metrics.values() for v in pair)

    assert np.array_equal(jax.grad(total)(jnp.asarray(LOGP)), -WEIGHT)


# ------------------------------------------------------------------------------------------------- GRPO


def formula(settings: GrpoSettings, old: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """The docstring's formula, token by token in float64: loss, its gradient, and what happened on the way."""
    logp = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    total, seen = torch.zeros((), dtype=torch.float64), {"clipped": 0, "tokens": 0, "kl": 0.0}
    for n in range(N):
        for k in range(K):
            a = float(ADVANTAGE[n, k])
            for t in range(C):
                if WEIGHT[n, k, t] == 0:
                    continue
                before = (
                    logp[n, k, t].detach() if old is None else torch.tensor(float(old[n, k, t]), dtype=torch.float64)
                )
                c = torch.exp(logp[n, k, t] - before)
                low, high = 1 - settings.clip_low, 1 + settings.clip_high
                inside = torch.clamp(c, low, high) * a
                gain = torch.minimum(c * a, inside)
                d = float(REF[n, k, t]) - logp[n, k, t]
                k3 = torch.exp(d) - d - 1
                total = total - (gain - settings.beta * k3)
                seen["clipped"] += int((c * a > inside).item())
                seen["tokens"] += 1
                seen["kl"] += k3.item()
    total = total / (N * K * settings.max_completion)
    total.backward()
    return total.detach(), logp.grad, seen


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("old", [None, OLD], ids=["on-policy", "old"])
def test_grpo_is_its_formula(beta, old):
    settings = GrpoSettings(clip_low=0.1, clip_high=0.3, beta=beta, max_completion=9)
    batch = batch_of(WEIGHT, ADVANTAGE)
    count = grpo_counts([batch], settings=settings)["policy"]
    assert count == N * K * 9
    before = None if old is None else jnp.asarray(old)

    def total(logp):
        ref = jnp.asarray(REF) if beta else None
        scores = Scores(logp=logp, entropy=jnp.asarray(ENTROPY), ref_logp=ref, old_logp=before)
        parts = grpo_loss(scores, batch, settings=settings)
        return parts.sums["policy"] / count, parts.metrics

    (value, metrics), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(LOGP))
    loss, slope, seen = formula(settings, old)
    assert_close(value, loss, 1e-6)
    assert_close(gradient, slope, 1e-6)
    # The loss divides by N K L_max: compare at the scale of one token too.
    assert_close(gradient * count, slope * count, 1e-5)
    assert metrics["clipped"] == (seen["clipped"], seen["tokens"])
    assert seen["clipped"] == 0 if old is None else 5 < seen["clipped"] < seen["tokens"]
    if old is None:
        assert metrics["ratio"][0] == metrics["ratio"][1], "on-policy every ratio is exactly 1"
    if beta:
        assert_close(metrics["kl"][0], seen["kl"], 1e-5)
    else:
        assert "kl" not in metrics
    assert_close(metrics["entropy"][0], (WEIGHT * ENTROPY).sum(), 1e-5)


@pytest.mark.parametrize(
    ("ratio", "advantage", "slope"),
    [
        # inside the bounds 0.9 and 1.3 the slope is c A
        (1.2, 2.0, 2.4),
        (0.95, -2.0, -1.9),
        # past a bound on the side where moving on would gain: none
        (1.31, 2.0, 0.0),
        (0.89, -2.0, 0.0),
        # past a bound on the other side: c A, so that mistakes can be undone
        (0.5, 2.0, 1.0),
        (3.0, -2.0, -6.0),
    ],
)
def test_where_the_clip_stops_the_gradient(ratio, advantage, slope):
    settings = GrpoSettings(clip_low=0.1, clip_high=0.3, max_completion=1)
    batch = batch_of(np.ones((1, 1, 1), np.float32), np.array([[advantage]], np.float32))

    def total(logp):
        scores = Scores(logp=logp, entropy=logp, old_logp=jnp.zeros((1, 1, 1)))
        return grpo_loss(scores, batch, settings=settings).sums["policy"]

    gradient = jax.grad(total)(jnp.full((1, 1, 1), np.log(ratio), jnp.float32))
    assert_close(-gradient, [[[slope]]], 1e-6)


def test_groups_of_equal_rewards_give_exactly_no_gradient():
    rewards = np.array([[0.7] * K, [1.0, 0.0, 0.0, 1.0], [0.1] * K])
    batch = batch_of(np.ones_like(WEIGHT), group_advantages(rewards, scale="group").value)

    def total(logp):
        scores = Scores(logp=logp, entropy=logp, old_logp=jnp.asarray(OLD))
        return grpo_loss(scores, batch, settings=GrpoSettings()).sums["policy"]

    gradient = np.asarray(jax.grad(total)(jnp.asarray(LOGP)))
    assert not gradient[[0, 2]].any()
    assert gradient[1].all() or np.count_nonzero(gradient[1]) > K


def test_what_stands_on_padding_does_not_matter():
    """Not even values whose ratio overflows: 0 x inf would be NaN for the whole batch."""
    settings = GrpoSettings(beta=0.1)
    batch = batch_of(WEIGHT, ADVANTAGE)

    def run(old, ref, rollout):
        def total(logp):
            scores = Scores(logp=logp, entropy=jnp.asarray(ENTROPY), ref_logp=ref, old_logp=old, rollout_logp=rollout)
            parts = grpo_loss(scores, batch, settings=settings)
            return parts.sums["policy"], parts.metrics

        return jax.value_and_grad(total, has_aux=True)(jnp.asarray(LOGP))

    (value, metrics), gradient = run(jnp.asarray(OLD), jnp.asarray(REF), jnp.asarray(OLD))
    spoilt = (jnp.asarray(np.where(WEIGHT > 0, x, bad)) for x, bad in ((OLD, -1e4), (REF, 1e4), (OLD, -np.inf)))
    (other, others), slope = run(*spoilt)
    assert np.array_equal(value, other)
    assert np.array_equal(gradient, slope)
    assert not np.asarray(gradient)[WEIGHT == 0].any()
    assert jax.tree.map(float, metrics) == jax.tree.map(float, others)


def test_counts_leave_out_padding_rows_and_add_over_micro_batches():
    settings = GrpoSettings(max_completion=5)
    padded = batch_of(WEIGHT, ADVANTAGE, group_id=np.array([3, 4, -1]))
    assert grpo_counts([padded, padded], settings=settings) == {"policy": 2.0 * 2 * K * 5}


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"clip_low": 1.0}, "clip"),
        ({"clip_low": -0.1}, "clip"),
        ({"clip_high": -0.1}, "clip"),
        ({"beta": -1.0}, "beta"),
        ({"max_completion": 0}, "max_completion"),
    ],
)
def test_wrong_settings_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        replace(GrpoSettings(), **wrong)
