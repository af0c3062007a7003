"""PPO: advantages against closed forms and a loop written out again, the loss against torch's autograd in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import assert_close

from vlmalign.objectives.gae import estimate_advantages, token_rewards, whiten
from vlmalign.objectives.kl import kl_per_token
from vlmalign.objectives.ppo import PpoSettings, ppo_counts, ppo_loss
from vlmalign.types import GroupBatch, Scores

N, K, C = 2, 3, 5
RNG = np.random.default_rng(0)
#: lengths 5, 3, 0 and 1, 4, 5; one token in the middle is another turn's
WEIGHT = np.array(
    [
        [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]],
        [[1, 0, 0, 0, 0], [1, 0, 1, 1, 0], [1, 1, 1, 1, 1]],
    ],
    np.float64,
)
SHAPE = WEIGHT.shape
LOGP, OLD, REF = (-2 * RNG.random(SHAPE) for _ in range(3))
VALUES, OLD_VALUES, RETURNS = (RNG.normal(size=SHAPE) for _ in range(3))
ADVANTAGE, ENTROPY = RNG.normal(size=SHAPE), RNG.random(SHAPE)
REWARDS = np.array([[1.0, -0.5, np.nan], [0.25, 2.0, 0.0]])


def batch_of(weight: np.ndarray) -> GroupBatch:
    n, k, c = weight.shape
    empty = np.zeros((n, 1 + k * c), np.int32)
    return GroupBatch(*(empty,) * 6, weight=weight, group_id=np.arange(n, dtype=np.int32))


# ---------------------------------------------------------------------------------- generalised advantage estimation


def test_the_reward_is_on_the_last_token_and_the_penalty_on_all():
    kl = kl_per_token(OLD, REF, WEIGHT)
    found = token_rewards(REWARDS, WEIGHT, kl=kl, beta=0.5)
    for n, k in np.ndindex(N, K):
        real = np.flatnonzero(WEIGHT[n, k])
        for t in range(C):
            expected = -0.5 * (OLD - REF)[n, k, t] if t in real else 0.0
            if real.size and t == real[-1]:
                expected += REWARDS[n, k]
            assert found[n, k, t] == pytest.approx(expected, abs=1e-12)
    assert_close(token_rewards(REWARDS, WEIGHT).sum(axis=-1), [[1.0, -0.5, 0.0], [0.25, 2.0, 0.0]], 1e-12)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae_is_the_discounted_sum_of_deltas(gamma, lam):
    """arXiv 1506.02438, eq. 16, with the sum written out over the tokens that count."""
    rewards = token_rewards(REWARDS, WEIGHT, kl=kl_per_token(OLD, REF, WEIGHT), beta=0.1)
    found = estimate_advantages(rewards, VALUES, WEIGHT, gamma=gamma, lam=lam)
    expected = np.zeros(SHAPE)
    for n, k in np.ndindex(N, K):
        real = np.flatnonzero(WEIGHT[n, k])
        v = [*VALUES[n, k, real], 0.0]
        deltas = [rewards[n, k, t] + gamma * v[i + 1] - v[i] for i, t in enumerate(real)]
        for i, t in enumerate(real):
            expected[n, k, t] = sum((gamma * lam) ** j * delta for j, delta in enumerate(deltas[i:]))
    assert_close(found.advantage, expected, 1e-6)
    assert_close(found.returns, np.where(WEIGHT > 0, expected + VALUES, 0.0), 1e-6)
    assert found.advantage.dtype == found.returns.dtype == np.float32


def test_gae_at_its_ends():
    """lambda = 1: reward to go less the value, whatever the values later on. Exact values: no advantage."""
    rewards = token_rewards(REWARDS, WEIGHT)
    to_go = np.flip(np.cumsum(np.flip(rewards, -1), axis=-1), -1) * WEIGHT
    found = estimate_advantages(rewards, VALUES, WEIGHT, lam=1.0)
    assert_close(found.returns, to_go, 1e-6)
    for lam in (0.0, 0.5, 1.0):
        assert_close(estimate_advantages(rewards, to_go, WEIGHT, lam=lam).advantage, np.zeros(SHAPE), 1e-12)


def test_gae_does_not_see_padding():
    rewards = token_rewards(REWARDS, WEIGHT)
    plain = estimate_advantages(rewards, VALUES, WEIGHT)
    spoilt = estimate_advantages(np.where(WEIGHT > 0, rewards, np.nan), np.where(WEIGHT > 0, VALUES, np.inf), WEIGHT)
    assert np.array_equal(plain.advantage, spoilt.advantage)
    assert np.array_equal(plain.returns, spoilt.returns)


def test_whitening_is_over_the_whole_optimiser_batch():
    whole = whiten([ADVANTAGE], [WEIGHT])[0]
    inside = whole[WEIGHT > 0]
    expected = torch.tensor(ADVANTAGE[WEIGHT > 0])
    expected = (expected - expected.mean()) * torch.rsqrt(expected.var() + 1e-8)
    assert_close(inside, expected, 1e-6)
    assert not whole[WEIGHT == 0].any()
    parts = whiten([ADVANTAGE[:1], ADVANTAGE[1:]], [WEIGHT[:1], WEIGHT[1:]])
    assert np.array_equal(np.concatenate(parts), whole)


# ------------------------------------------------------------------------------------------------------------- loss


def given(spoil: float | None = None) -> dict[str, np.ndarray]:
    every = {
        "old_logp": OLD,
        "ref_logp": REF,
        "old_values": OLD_VALUES,
        "returns": RETURNS,
        "advantage": ADVANTAGE,
    }
    if spoil is None:
        return every
    return {name: np.where(WEIGHT > 0, value, spoil) for name, value in every.items()}


def ours(settings: PpoSettings, rows: list[list[int]], spoil: float | None = None):
    counts = ppo_counts([batch_of(WEIGHT[own]) for own in rows], settings=settings)
    loss, slopes, metrics = 0.0, [np.zeros(SHAPE) for _ in range(3)], {}
    for own in rows:
        recorded = {name: jnp.asarray(value[own]) for name, value in given(spoil).items()}

        def total(logp, values, entropy, recorded=recorded, own=own):
            scores = Scores(logp=logp, values=values, entropy=entropy, **recorded)
            parts = ppo_loss(scores, batch_of(WEIGHT[own]), settings=settings)
            return sum(value / counts[name] for name, value in parts.sums.items()), parts.metrics

        (value, found), gradients = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(
            *(jnp.asarray(x[own]) for x in (LOGP, VALUES, ENTROPY))
        )
        loss += float(value)
        for slope, gradient in zip(slopes, gradients, strict=True):
            slope[own] = gradient
        for name, pair in found.items():
            metrics[name] = np.add(metrics.get(name, 0.0), [float(x) for x in pair])
    return loss, slopes, metrics


def formula(settings: PpoSettings):
    """The docstring's formula, token by token in torch."""
    logp, values, entropy = (torch.tensor(x, requires_grad=True) for x in (LOGP, VALUES, ENTROPY))
    policy, value, bonus = [], [], []
    for at in map(tuple, np.argwhere(WEIGHT > 0)):
        a = float(ADVANTAGE[at])
        c = torch.exp(logp[at] - float(OLD[at]))
        held = torch.clamp(c, 1 - settings.clip_low, 1 + settings.clip_high)
        d = float(REF[at]) - logp[at]
        kl = {"k1": -d, "k2": d**2 / 2, "k3": torch.exp(d) - d - 1}[settings.kl]
        policy.append(-torch.min(c * a, held * a) + settings.beta * kl)
        errors = [(values[at] - float(RETURNS[at])) ** 2]
        if settings.value_clip is not None:
            before = float(OLD_VALUES[at])
            near = before + torch.clamp(values[at] - before, -settings.value_clip, settings.value_clip)
            errors.append((near - float(RETURNS[at])) ** 2)
        value.append(max(errors, key=lambda x: x.item()) / 2)
        bonus.append(entropy[at])
    total = torch.stack(policy).mean() + settings.value_coef * torch.stack(value).mean()
    total = total - settings.entropy_coef * torch.stack(bonus).mean()
    total.backward()
    slopes = [torch.zeros_like(x) if x.grad is None else x.grad for x in (logp, values, entropy)]
    return total.item(), [s.numpy() for s in slopes]


SETTINGS = [
    PpoSettings(),
    PpoSettings(clip_low=0.1, clip_high=0.4, value_clip=None, value_coef=0.5, entropy_coef=0.02),
    PpoSettings(value_clip=0.5, value_coef=1.0, beta=0.3),
    PpoSettings(beta=0.3, kl="k2", value_coef=0.0),
]


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradients_are_the_formula(settings, float64):
    value, slopes = formula(settings)
    found, gradients, _ = ours(settings, [[0, 1]])
    assert_close(found, value, 1e-12)
    for gradient, slope in zip(gradients, slopes, strict=True):
        assert_close(gradient, slope, 1e-12)
        assert not gradient[WEIGHT == 0].any()
    assert np.count_nonzero(gradients[0]) > 5


@pytest.mark.parametrize("settings", SETTINGS)
def test_micro_batches_add_up_and_padding_does_not_matter(settings, float64):
    loss, gradients, metrics = ours(settings, [[0, 1]])
    for other in (ours(settings, [[0], [1]]), ours(settings, [[0, 1]], 50.0), ours(settings, [[0, 1]], np.nan)):
        assert_close(other[0], loss, 1e-12)
        for x, y in zip(other[1], gradients, strict=True):
            assert_close(x, y, 1e-12)
        for name in metrics:
            assert_close(other[2][name], metrics[name], 1e-12, name)


@pytest.mark.parametrize(
    ("value", "slope"),
    [
        # old value 0, return 1, clip 0.2. Within the clip: V - R.
        (0.1, -0.9),
        # Past it towards the return the clipped error is the larger and does not move: no gradient.
        (0.5, 0.0),
        # Past it away from the return the plain error is the larger.
        (-0.5, -1.5),
    ],
)
def test_where_the_value_clip_stops_the_gradient(value, slope):
    batch = batch_of(np.ones((1, 1, 1), np.float32))
    zero, one = jnp.zeros((1, 1, 1)), jnp.ones((1, 1, 1))

    def total(values):
        scores = Scores(logp=zero, values=values, old_logp=zero, old_values=zero, returns=one, advantage=zero)
        return ppo_loss(scores, batch, settings=PpoSettings(value_coef=1.0)).sums["value"]

    assert_close(jax.grad(total)(value * one), [[[slope]]], 1e-6)


def test_metrics():
    _, _, metrics = ours(PpoSettings(), [[0, 1]])
    real = WEIGHT > 0
    ratio = np.exp(LOGP - OLD)[real]
    a = ADVANTAGE[real]
    tokens = real.sum()
    assert_close(metrics["clip_low"], [((ratio < 0.8) & (a < 0)).sum(), tokens], 1e-6)
    assert_close(metrics["clip_high"], [((ratio > 1.2) & (a > 0)).sum(), tokens], 1e-6)
    assert_close(metrics["ratio"], [ratio.sum(), tokens], 1e-6)
    assert_close(metrics["value_error"], [((VALUES - RETURNS)[real] ** 2).sum(), tokens], 1e-6)
    assert 0 < metrics["value_clipped"][0] < tokens


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"clip_low": 1.0}, "clip"),
        ({"clip_high": -0.1}, "clip"),
        ({"value_clip": 0.0}, "value_clip"),
        ({"value_coef": -1.0}, "value_coef"),
        ({"beta": -1.0}, "beta"),
        ({"entropy_coef": -1.0}, "entropy_coef"),
        ({"kl": "k5"}, "k1, k2, k3"),
    ],
)
def test_wrong_settings_are_refused(wrong, named):
    with pytest.raises(ValueError, match=named):
        PpoSettings(**wrong)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ppo_loss(Scores(logp=LOGP, old_logp=OLD), batch_of(WEIGHT), settings=PpoSettings()), "Scores.values"),
        (lambda: token_rewards(np.full((N, K), np.nan), WEIGHT), "completion 0 of row 0"),
        (lambda: token_rewards(REWARDS, WEIGHT, beta=-1.0), "beta"),
        (lambda: estimate_advantages(VALUES, VALUES, WEIGHT, gamma=1.1), "gamma"),
        (lambda: estimate_advantages(VALUES, VALUES, WEIGHT, lam=-0.1), "lambda"),
        (lambda: whiten([ADVANTAGE], [0 * WEIGHT]), "2 tokens"),
    ],
)
def test_bad_input_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()
