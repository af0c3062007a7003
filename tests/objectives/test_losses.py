"""SFT against torch's cross entropy; GRPO against its formula written out again in float64, split and spoilt.

That every loss of the family is TRL's is in `test_grpo_trl.py`.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import assert_close

from vlmalign.objectives.advantages import group_advantages
from vlmalign.objectives.entropy import (
    AdaptiveEntropy,
    applied_coefficient,
    init_entropy,
    top_entropy_masks,
    update_entropy,
)
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss, grpo_maxima, loss_weight
from vlmalign.objectives.grpo_settings import LOSSES
from vlmalign.objectives.kl import kl_estimate
from vlmalign.objectives.rollout_correction import RolloutCorrection
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


# ------------------------------------------------------------------------- the family: cuts, padding, refusals

TRUNCATED = np.array([[False, True, False, False], [True, False, False, False], [False] * 4])
VARIANTS = {
    **{name: GrpoSettings(loss=name, beta=0.2, clip_low=0.1, clip_high=0.3) for name in LOSSES},
    "everything": GrpoSettings(
        loss="grpo",
        beta=0.2,
        kl_unbiased=True,
        delta=1.5,
        mask_truncated=True,
        off_policy_threshold=0.02,
        top_entropy=0.5,
        entropy_coef=0.1,
        rollout=RolloutCorrection("sequence_truncate", 0.5, 2.0),
    ),
    "vespo, corrected": GrpoSettings(loss="vespo", rollout=RolloutCorrection("token_mask", 0.5, 2.0), beta=0.1),
    "kept support": GrpoSettings(
        loss="dapo", rollout=RolloutCorrection("token_truncate", support="kept"), kl="k2", beta=0.1
    ),
}
ROLLOUT = (OLD + 0.2 * RNG.normal(size=OLD.shape)).astype(np.float32)
KEPT = (ROLLOUT + 0.05).astype(np.float32)
RECORDED = {"old_logp": OLD, "ref_logp": REF, "rollout_logp": ROLLOUT, "kept_logp": KEPT}


def run_family(settings: GrpoSettings, rows: list[list[int]], spoil: float | None = None):
    """Loss, gradient [N, K, C] and metric quotients, of the rows cut into these micro-batches."""
    weight, group_id = WEIGHT, np.array([3, 4, -1])
    outside = np.broadcast_to((weight == 0) | (group_id < 0)[:, None, None], weight.shape)

    def on_padding(x: np.ndarray) -> np.ndarray:
        return x if spoil is None else np.where(outside, np.float32(spoil), x)

    def cut(own: list[int]) -> GroupBatch:
        found = batch_of(weight[own], ADVANTAGE[own], group_id[own])
        return found._replace(truncated=TRUNCATED[own])

    batches = [cut(own) for own in rows]
    if settings.top_entropy < 1:
        masks = top_entropy_masks(
            [on_padding(ENTROPY)[own] for own in rows],
            [loss_weight(b, settings) > 0 for b in batches],
            share=settings.top_entropy,
        )
        batches = [b._replace(entropy_mask=m) for b, m in zip(batches, masks, strict=True)]
    counts = grpo_counts(batches, settings=settings)
    loss, gradient, metrics = 0.0, np.zeros_like(LOGP), {}
    for own, batch in zip(rows, batches, strict=True):
        recorded = {name: jnp.asarray(on_padding(value)[own]) for name, value in RECORDED.items()}

        def total(logp, batch=batch, recorded=recorded, own=own):
            scores = Scores(logp=logp, entropy=jnp.asarray(on_padding(ENTROPY)[own]), **recorded)
            parts = grpo_loss(scores, batch, settings=settings)
            return sum(value / counts[name] for name, value in parts.sums.items()), parts.metrics

        (value, found), slope = jax.value_and_grad(total, has_aux=True)(jnp.asarray(on_padding(LOGP)[own]))
        loss += value
        gradient[own] = slope
        for name, (a, b) in found.items():
            before = metrics.get(name, (0.0, 0.0))
            metrics[name] = (before[0] + float(a), before[1] + float(b))
    return float(loss), gradient, metrics


@pytest.mark.full
@pytest.mark.parametrize("name", VARIANTS)
def test_micro_batches_add_up_to_the_whole(name):
    loss, gradient, metrics = run_family(VARIANTS[name], [[0, 1, 2]])
    assert np.count_nonzero(gradient) > 3
    # The uneven cut only once: every shape compiles anew.
    for rows in ([[0], [1], [2]], *([[[0, 2], [1]]] if name == "everything" else [])):
        other, slope, others = run_family(VARIANTS[name], rows)
        assert_close(other, loss, 1e-6)
        assert_close(slope, gradient, 1e-6)
        assert others.keys() == metrics.keys()
        for key in metrics:
            assert_close(others[key], metrics[key], 1e-5, key)


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_may_hold_anything(name):
    """Log ratios of +-50 and more, infinities and NaN where nothing counts: bit-identical, and no gradient there."""
    loss, gradient, metrics = run_family(VARIANTS[name], [[0, 1, 2]])
    assert not gradient[WEIGHT == 0].any()
    for spoil in (-1e4, 50.0, np.inf, -np.inf, np.nan):
        other, slope, others = run_family(VARIANTS[name], [[0, 1, 2]], spoil)
        assert other == loss
        assert np.array_equal(slope, gradient)
        assert others == metrics


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("far", [50.0, 200.0])
def test_log_ratios_far_away_stay_finite(name, far):
    """On real tokens too: exp(200) is infinite in float32, and infinity times an advantage of 0 is NaN."""
    settings = GrpoSettings(loss=name, beta=0.1)
    batch = batch_of(np.ones_like(WEIGHT), ADVANTAGE)  # of both signs, and 0
    for sign in (1, -1):
        other = jnp.full((N, K, C), -1.0 + sign * far)

        def total(logp, other=other):
            scores = Scores(logp=logp, entropy=logp, old_logp=other, ref_logp=other)
            return grpo_loss(scores, batch, settings=settings).sums["policy"]

        value, slope = jax.value_and_grad(total)(jnp.full((N, K, C), -1.0))
        assert np.isfinite(value)
        assert np.isfinite(slope).all()


@pytest.mark.parametrize("name", LOSSES)
def test_equal_rewards_teach_nothing_whatever_the_loss(name):
    batch = batch_of(np.ones_like(WEIGHT), group_advantages(np.full((N, K), 0.7), scale="group").value)
    settings = GrpoSettings(loss=name)

    def total(logp):
        scores = Scores(logp=logp, entropy=logp, old_logp=jnp.asarray(OLD))
        return grpo_loss(scores, batch, settings=settings).sums["policy"]

    assert not np.asarray(jax.grad(total)(jnp.asarray(LOGP))).any()


@pytest.mark.parametrize(
    ("loss", "divisor", "per_sequence"),
    [
        ("grpo", 8, True),  # two rows of four completions
        ("gspo", 8, True),
        ("sapo", 8, True),
        ("gmpo", 8, True),
        ("luspo", 8, False),
        ("dr_grpo", 8 * 9, False),
        ("bnpo", 25, False),  # tokens: 6 + 1 + 3 + 0 and 2 + 2 + 6 + 5
        ("dapo", 25, False),
        ("cispo", 25, False),
        ("vespo", 25, False),
    ],
)
def test_what_a_loss_is_divided_by(loss, divisor, per_sequence):
    """With A = 1 the gradient on-policy is minus what a token counts for, over the divisor."""
    settings = GrpoSettings(loss=loss, max_completion=9, clip_high=2.0)
    batch = batch_of(WEIGHT, np.ones((N, K), np.float32), np.array([0, 1, -1]))
    counts = grpo_counts([batch], settings=settings)
    assert counts == {"policy": divisor}

    def total(logp):
        return grpo_loss(Scores(logp=logp, entropy=logp), batch, settings=settings).sums["policy"]

    lengths = np.maximum(WEIGHT.sum(axis=-1, keepdims=True), 1)
    share = WEIGHT / lengths if per_sequence else WEIGHT
    assert_close(jax.grad(total)(jnp.asarray(LOGP)), -share, 1e-6)


def test_an_optimiser_batch_of_nothing_but_truncated_completions():
    """Its gradient is 0; a batch without any loss token is still an error of the caller (a count of 0)."""
    settings = GrpoSettings(loss="dapo", mask_truncated=True)
    batch = batch_of(WEIGHT, ADVANTAGE)._replace(truncated=np.ones((N, K), bool))
    assert grpo_counts([batch], settings=settings) == {"policy": 1.0}
    parts = grpo_loss(Scores(logp=LOGP, entropy=ENTROPY), batch, settings=settings)
    assert parts.sums["policy"] == 0
    assert grpo_counts([batch_of(0 * WEIGHT, ADVANTAGE)], settings=GrpoSettings(loss="dapo")) == {"policy": 0.0}


def test_raw_log_ratios_to_the_rollout_engine_are_logged():
    settings = GrpoSettings()
    batch = batch_of(WEIGHT, ADVANTAGE)
    rollout = ROLLOUT.copy()
    rollout[0, 0, 1] = np.nan  # the engine did not say
    scores = Scores(logp=LOGP, entropy=ENTROPY, old_logp=OLD, rollout_logp=rollout, kept_logp=KEPT)
    metrics = grpo_loss(scores, batch, settings=settings).metrics
    known = (WEIGHT > 0) & ~np.isnan(rollout)
    drift = (OLD - rollout)[known]
    for name, expected in (
        ("rollout_gap", np.abs(drift)),
        ("rollout_log_ratio", drift),
        ("rollout_ratio", np.exp(drift)),
        ("kept_ratio", np.exp((OLD - KEPT)[WEIGHT > 0])),
    ):
        assert_close(metrics[name][0], expected.sum(), 1e-5, name)
        assert metrics[name][1] == expected.size
    largest = grpo_maxima(scores, batch, settings=settings)
    assert_close(largest["rollout_gap_max"], np.abs(drift).max(), 1e-6)
    assert_close(largest["log_ratio_max"], np.abs(LOGP - OLD)[WEIGHT > 0].max(), 1e-6)


def test_the_mean_ratio_over_kept_support_is_the_kept_mass():
    """Sampling from the top of a distribution: the expected ratio to what was sampled from is the mass kept."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    kept = np.array([0.5, 0.3])
    q = kept / kept.sum()
    assert_close((q * np.exp(np.log(p[:2]) - np.log(q))).sum(), 0.8, 1e-12)
    batch = batch_of(np.ones((1, 1, 10), np.float32), np.ones((1, 1), np.float32))
    drawn = np.repeat([0, 1], [5, 5])[None, None]  # any draw gives the same ratio
    logp = np.log(p)[drawn].astype(np.float32)
    scores = Scores(logp=logp, rollout_logp=logp, kept_logp=np.log(q)[drawn].astype(np.float32))
    metrics = grpo_loss(scores, batch, settings=GrpoSettings()).metrics
    assert_close(metrics["kept_ratio"][0] / metrics["kept_ratio"][1], 0.8, 1e-6)
    assert metrics["rollout_ratio"] == (10.0, 10.0)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_and_their_gradients_on_policy(kind):
    """In expectation over the policy: unbiased values for k1 and k3; with the ratio, the gradient of the KL itself."""
    with jax.enable_x64(True):
        z, ref = jnp.array([0.3, -0.5, 0.1, 0.4]), jax.nn.log_softmax(jnp.array([-0.2, 0.6, 0.0, 0.1]))

        def kl(z):
            logp = jax.nn.log_softmax(z)
            return jnp.sum(jnp.exp(logp) * (logp - ref))

        def expected(z, unbiased: bool):
            logp = jax.nn.log_softmax(z)
            p = jax.lax.stop_gradient(jnp.exp(logp))
            estimate = kl_estimate(ref - logp, kind)
            if unbiased:
                estimate = estimate * jnp.exp(logp - jax.lax.stop_gradient(logp))
            return jnp.sum(p * estimate)

        if kind != "k2":
            assert_close(expected(z, False), kl(z), 1e-12)
            assert_close(jax.grad(expected)(z, True), jax.grad(kl)(z), 1e-12)
        plain = jax.grad(expected)(z, False)
        if kind == "k1":
            assert_close(plain, np.zeros(4), 1e-12)
        elif kind == "k2":
            assert_close(plain, jax.grad(kl)(z), 1e-12)
        else:
            forward = jax.grad(lambda z: jnp.sum(jnp.exp(ref) * (ref - jax.nn.log_softmax(z))))(z)
            assert_close(plain, forward, 1e-12)


def test_the_entropy_bonus_pays_its_coefficient_times_the_mean():
    batch = batch_of(WEIGHT, ADVANTAGE)
    settings = GrpoSettings(entropy_coef=0.01)

    def total(entropy):
        parts = grpo_loss(Scores(logp=jnp.asarray(LOGP), entropy=entropy), batch, settings=settings)
        return parts.sums["entropy"] / grpo_counts([batch], settings=settings)["entropy"]

    assert_close(total(jnp.asarray(ENTROPY)), -0.01 * ENTROPY[WEIGHT > 0].mean(), 1e-7)
    assert_close(jax.grad(total)(jnp.asarray(ENTROPY)), -0.01 * WEIGHT / WEIGHT.sum(), 1e-8)


def test_an_adaptive_entropy_coefficient():
    """As in Skywork-OR1: up while the entropy is at or below the target and applied then; down and off above it."""
    adaptive = AdaptiveEntropy(initial=0.02, target=0.5, step=0.01, low=0.0, high=0.04)
    state = init_entropy(adaptive)
    seen = [applied_coefficient(state, adaptive)]
    for entropy in (0.4, 0.5, 0.3, 0.6, 0.2):
        state = update_entropy(entropy, state, adaptive)
        seen.append(applied_coefficient(state, adaptive))
    assert_close(seen, [0.0, 0.03, 0.04, 0.04, 0.0, 0.04], 1e-12)
    settings = GrpoSettings(adaptive_entropy=adaptive)
    batch = batch_of(WEIGHT, ADVANTAGE)
    assert grpo_counts([batch], settings=settings, entropy_coef=0.0)["entropy"] == np.inf
    assert_close(grpo_counts([batch], settings=settings, entropy_coef=0.5)["entropy"], 2 * WEIGHT.sum(), 1e-9)
    with pytest.raises(ValueError, match="applied_coefficient"):
        grpo_counts([batch], settings=settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (GrpoSettings(beta=0.1), "ref_logp"),
        (GrpoSettings(rollout=RolloutCorrection()), "rollout_logp"),
        (GrpoSettings(rollout=RolloutCorrection(support="kept")), "kept_logp"),
        (GrpoSettings(mask_truncated=True), "GroupBatch.truncated"),
        (GrpoSettings(top_entropy=0.5), "GroupBatch.entropy_mask"),
        (GrpoSettings(entropy_coef=0.5), "Scores.entropy"),
    ],
)
def test_what_a_setting_needs_is_asked_for(settings, named):
    with pytest.raises(ValueError, match=named):
        grpo_loss(Scores(logp=jnp.asarray(LOGP)), batch_of(WEIGHT, ADVANTAGE), settings=settings)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"clip_low": 1.0}, "clip"),
        ({"clip_low": -0.1}, "clip"),
        ({"clip_high": -0.1}, "clip"),
        ({"beta": -1.0}, "beta"),
        ({"max_completion": 0}, "max_completion"),
        ({"loss": "dappo"}, "did you mean dapo"),
        ({"loss": "gsppo"}, "did you mean gspo"),
        ({"kl": "k4"}, "k1, k2, k3; found 'k4'"),
        ({"level": "sentence"}, "token, sequence; found 'sentence', did you mean sequence"),
        ({"loss": "gspo", "level": "token"}, "set loss to grpo"),
        ({"loss": "vespo", "level": "sequence"}, "set level to token"),
        ({"loss": "vespo", "rollout": RolloutCorrection()}, "token_truncate or token_mask"),
        ({"loss": "cispo", "clip_high": 0.0}, "cispo"),
        ({"loss": "gmpo", "clip_low": -0.1}, "gmpo"),
        ({"loss": "sapo", "delta": 2.0}, "delta"),
        ({"delta": 0.0}, "delta"),
        ({"top_entropy": 1.1}, "top_entropy"),
        ({"top_entropy": -0.1}, "top_entropy"),
        ({"entropy_coef": -0.1}, "entropy_coef"),
        ({"off_policy_threshold": 0.0}, "off_policy_threshold"),
        ({"sapo_tau": (0.0, 1.0)}, "sapo_tau"),
        ({"vespo_negative": (1.0, 0.0)}, "vespo_negative"),
        ({"clip_low": float("nan")}, "clip"),
        ({"beta": float("nan")}, "beta"),
    ],
)
def test_wrong_settings_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        replace(GrpoSettings(), **wrong)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"mode": "token_trunc"}, "did you mean token_truncate"),
        ({"support": "keep"}, "did you mean kept"),
        ({"low": 3.0}, "low < high"),
        ({"low": -1.0}, "low >= 0"),
        ({"high": 0.0}, "high > 0"),
        ({"mode": "token_truncate", "high": None}, "set low or high"),
    ],
)
def test_wrong_corrections_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        RolloutCorrection(**wrong)


@pytest.mark.parametrize(("wrong", "named"), [({"low": -0.1}, "low"), ({"low": 2.0}, "low"), ({"step": -1.0}, "step")])
def test_wrong_adaptive_entropy_is_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        AdaptiveEntropy(**wrong)
