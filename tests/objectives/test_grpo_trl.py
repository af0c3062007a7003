"""The GRPO family is TRL 1.16's: loss, gradients and metrics against its own functions, on random cases, in float64.

A case runs the whole way through both: rewards -> advantages, masks, importance ratios to the rollout engine -> loss.
TRL sees B x T rows; ours sees the same rows as groups, with a padding row of rubbish added.
"""

import warnings
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_checkpoints import assert_close
from trl.trainer.rloo_trainer import RLOOTrainer
from trl_grpo import bare_trainer, trl_batch, trl_loss

from vlmalign.objectives.advantages import AGGREGATIONS, SCALES, combined_advantages, leave_one_out_advantages
from vlmalign.objectives.entropy import top_entropy_masks
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss, loss_weight
from vlmalign.objectives.kl import kl_per_token, rewards_less_kl
from vlmalign.objectives.rollout_correction import MODES, RolloutCorrection
from vlmalign.types import GroupBatch, Scores

N, K, C = 3, 4, 6
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
AGGREGATION = dict(zip(AGGREGATIONS, ("sum_then_normalize", "normalize_then_sum"), strict=True))


@pytest.fixture(autouse=True)
def float64():
    """Formulas are compared, not rounding; `test_losses.py` has float32."""
    with jax.enable_x64(True):
        yield


def draw(seed: int) -> dict[str, np.ndarray]:
    """Rewards and, per token, log-probabilities of all kinds; old ones now and then far away, recorded ones NaN."""
    rng = np.random.default_rng(seed)
    shape = (N * K, C)
    logp = -3 * rng.random(shape)
    case = {
        "logp": logp,
        "old": logp + 0.4 * rng.normal(size=shape) + (rng.random(shape) < 0.05) * rng.normal(size=shape) * 3,
        "ref": logp + 0.5 * rng.normal(size=shape),
        "entropy": 2 * rng.random(shape, np.float32),  # TRL compares them in float32
        "lengths": rng.integers(1, C + 1, N * K),
        "truncated": rng.random(N * K) < 0.25,
        "rewards": rng.integers(0, 5, (N * K, 2)) / 4.0,
        "weights": rng.integers(1, 4, 2) / 2.0,
    }
    case["lengths"][0] = C  # TRL pads to the longest
    case["truncated"][0] = False
    case["sampling"] = case["old"] + 0.3 * rng.normal(size=shape)
    case["sampling"][rng.random(shape) < 0.03] = np.nan
    case["rewards"][rng.random((N * K, 2)) < 0.1] = np.nan
    return case


def batch_of(case: dict[str, np.ndarray], advantage: np.ndarray) -> GroupBatch:
    """N rows and one of padding."""
    weight = (np.arange(C) < case["lengths"][:, None]).astype(np.float64).reshape(N, K, C)
    empty = np.zeros((N + 1, 1 + K * C), np.int32)
    return GroupBatch(
        *(empty,) * 6,
        weight=np.concatenate([weight, np.zeros((1, K, C))]),
        group_id=np.array([*range(N), -1], np.int32),
        advantage=np.concatenate([advantage, np.zeros((1, K))]),
        truncated=np.concatenate([case["truncated"].reshape(N, K), np.zeros((1, K), bool)]),
    )


def rows(x: np.ndarray, rubbish: float) -> np.ndarray:
    return np.concatenate([np.float64(1) * x.reshape(N, K, C), np.full((1, K, C), rubbish)])


def ours(case: dict[str, np.ndarray], settings: GrpoSettings, advantage: np.ndarray, *, old: bool, sampled: bool):
    """Loss, gradients with respect to log-probabilities and entropies as [B, T], metrics as quotients."""
    batch = batch_of(case, advantage)
    if settings.top_entropy < 1:
        masks = [loss_weight(batch, settings) > 0]
        batch = batch._replace(
            entropy_mask=top_entropy_masks([rows(case["entropy"], 9.0)], masks, share=settings.top_entropy)[0]
        )
    counts = grpo_counts([batch], settings=settings)
    recorded = {
        "old_logp": rows(case["old"], 50.0) if old else None,
        "ref_logp": rows(case["ref"], 50.0) if settings.beta else None,
        "rollout_logp": rows(case["sampling"], -50.0) if sampled else None,
    }

    def total(logp, entropy):
        parts = grpo_loss(Scores(logp=logp, entropy=entropy, **recorded), batch, settings=settings)
        return sum(value / counts[name] for name, value in parts.sums.items()), parts.metrics

    given = jnp.asarray(rows(case["logp"], -50.0)), jnp.asarray(rows(case["entropy"], 9.0))
    (value, metrics), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(*given)
    for gradient in gradients:
        assert not np.asarray(gradient[N]).any(), "padding has a gradient"
    gradients = [np.asarray(g[:N]).reshape(N * K, C) for g in gradients]
    return value, *gradients, {name: float(a) / max(float(b), 1.0) for name, (a, b) in metrics.items()}


#: our metrics under TRL's names
METRICS = {
    "kl": "kl",
    "entropy": "entropy",
    "clip_low": "clip_ratio/low_mean",
    "clip_high": "clip_ratio/high_mean",
    "clipped": "clip_ratio/region_mean",
    "vespo_weight": "vespo/phi_seq_mean",
}


def compare(
    seed: int, *, loss: str, level: str = "token", mode: str | None = None, old: bool = True, **options
) -> None:
    """One case, both ways. `options` are ours; the rest is drawn."""
    case = draw(seed)
    rng = np.random.default_rng([seed, 1])
    scale, aggregation = rng.choice(SCALES), rng.choice(AGGREGATIONS)
    old = old or mode is not None  # with a correction TRL always records the old policy
    low, high = [(None, 2.0), (0.5, 2.0), (0.7, None)][seed % 3]
    correction = None if mode is None else RolloutCorrection(mode, low, high)
    clip_low, clip_high = rng.choice([0.0, 0.1, 0.3]), rng.choice([0.0, 0.2, 0.5])
    if loss == "cispo":
        clip_high = rng.choice([1.0, 1.2, 5.0])
    settings = GrpoSettings(
        clip_low, clip_high, max_completion=9, loss=loss, level=level, rollout=correction, **options
    )
    known = combined_advantages(case["rewards"].reshape(N, K, 2), case["weights"], aggregation=aggregation, scale=scale)
    theirs = trl_batch(
        case["rewards"],
        group=K,
        weights=case["weights"],
        lengths=case["lengths"],
        truncated=case["truncated"],
        logps={name: case[name] for name in ("old", "ref", "sampling")},
        scale_rewards=scale,
        multi_objective_aggregation=AGGREGATION[aggregation],
        mask_truncated_completions=settings.mask_truncated,
        beta=settings.beta,
        use_vllm=mode is not None,
        vllm_importance_sampling_correction=mode is not None,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )
    assert_close(known.value.reshape(-1), theirs["advantages"], 1e-6, "advantages")
    advantage = theirs["advantages"].numpy()  # the same to the last bit from here on
    arrays = {
        "logp": case["logp"],
        "entropy": case["entropy"],
        "mask": theirs["completion_mask"].numpy(),
        "advantage": advantage,
        **({"old": case["old"]} if old else {}),
        **({"ref": case["ref"]} if settings.beta else {}),
    }
    if mode is not None:
        arrays |= {"ratio": theirs["importance_sampling_ratio"], "sampling": case["sampling"]}
    value, slope, bend, metrics = trl_loss(
        arrays,
        loss_type=loss,
        importance_sampling_level=level,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        max_completion_length=9,
        beta=settings.beta,
        use_bias_correction_kl=settings.kl_unbiased,
        delta=settings.delta,
        off_policy_mask_threshold=settings.off_policy_threshold,
        top_entropy_quantile=settings.top_entropy,
        entropy_coef=settings.entropy_coef,
        sapo_temperature_pos=settings.sapo_tau[0],
        sapo_temperature_neg=settings.sapo_tau[1],
        vespo_k_pos=settings.vespo_positive[0],
        vespo_lambda_pos=settings.vespo_positive[1],
        vespo_k_neg=settings.vespo_negative[0],
        vespo_lambda_neg=settings.vespo_negative[1],
        use_vllm=mode is not None,
        vllm_importance_sampling_correction=mode is not None,
    )
    found = ours(case, settings, advantage.reshape(N, K), old=old, sampled=mode is not None)
    what = f"seed {seed}, {settings}"
    assert np.isfinite(slope).all(), what
    assert_close(found[0], value, 1e-9, what)
    assert_close(found[1], slope, 1e-9, what)
    assert_close(found[2], bend, 1e-9, what)
    for name, theirs_name in METRICS.items():
        assert (name in found[3]) == (theirs_name in metrics) or loss == "cispo", name
        if theirs_name in metrics:
            assert_close(found[3][name], metrics[theirs_name], 1e-6, name)
    if loss == "cispo":
        assert_close(found[3]["clip_high"], metrics["cispo_clip_ratio"], 1e-6)


#: (beta, multiplied by the ratio, level of the ratio)
PENALTIES = [
    (0.0, False, "token"),
    (0.3, False, "sequence"),
    (0.3, True, "token"),
    (0.3, True, "sequence"),
]


def others(rng: np.random.Generator, loss: str) -> dict:
    """Options that every loss is crossed with at random. Numbers are exact in float32, to which TRL rounds some."""
    return {
        "old": bool(rng.random() < 0.7),
        "mask_truncated": bool(rng.random() < 0.5),
        "off_policy_threshold": [None, 0.05][rng.integers(2)],
        "top_entropy": [1.0, 0.4, 0.2, 0.0][rng.integers(4)],
        "entropy_coef": [0.0, 0.01][rng.integers(2)],
        "delta": [None, 1.0, 1.7][rng.integers(3)] if loss in LOSSES[:5] else None,
        "sapo_tau": [(1.0, 1.0625), (0.5, 2.0)][rng.integers(2)],
        "vespo_positive": [(2.0, 3.0), (1.5, 0.5)][rng.integers(2)],
        "vespo_negative": [(3.0, 2.0), (0.5, 1.5)][rng.integers(2)],
    }


def compare_all(loss: str, mode: str | None, seeds: range) -> None:
    for seed in seeds:
        beta, unbiased, level = PENALTIES[seed % len(PENALTIES)]
        if loss == "vespo":
            level = "token"  # it weighs sequences itself
        rng = np.random.default_rng([seed, LOSSES.index(loss), [None, *MODES].index(mode)])
        compare(seed, loss=loss, mode=mode, level=level, beta=beta, kl_unbiased=unbiased, **others(rng, loss))


#: vespo multiplies token ratios into its own sequence weight
PAIRS = [
    (loss, mode) for loss, mode in product(LOSSES, (None, *MODES)) if loss != "vespo" or "sequence" not in str(mode)
]


@pytest.mark.parametrize(("loss", "mode"), PAIRS)
def test_loss_gradients_and_metrics(loss, mode):
    """Every loss x rollout correction x penalty x level of the ratio, the other options in turn."""
    compare_all(loss, mode, range(4))


@pytest.mark.soak
@pytest.mark.parametrize(("loss", "mode"), PAIRS)
def test_many_more_cases(loss, mode):
    compare_all(loss, mode, range(4, 104))


@pytest.mark.full
@pytest.mark.parametrize("loss", LOSSES)
def test_in_float32_too(loss):
    """As trained: to 1e-6, with every default that TRL has."""
    case, advantage = draw(8), np.linspace(-1, 1, N * K)
    arrays = {name: case[name] for name in ("logp", "entropy", "old", "ref")}
    arrays |= {"mask": (np.arange(C) < case["lengths"][:, None]) * 1.0, "advantage": advantage}
    value, slope, _, _ = trl_loss(arrays, loss_type=loss, beta=0.04)
    settings = GrpoSettings(beta=0.04, kl_unbiased=True, loss=loss, level="token", max_completion=9)
    with jax.enable_x64(False):
        found = ours(case, settings, advantage.reshape(N, K), old=True, sampled=False)
    assert found[1].dtype == np.float32
    assert_close(found[0], value, 1e-6)
    assert_close(found[1], slope, 1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_gspo_is_grpo_with_sequence_ratios(level):
    """The paper's set-up in TRL: loss_type grpo, importance_sampling_level sequence."""
    case, advantage = draw(5), np.linspace(-1, 1, N * K).reshape(N, K)
    gspo = ours(case, GrpoSettings(loss="gspo", beta=0.1), advantage, old=True, sampled=False)
    grpo = ours(case, GrpoSettings(loss="grpo", level=level, beta=0.1), advantage, old=True, sampled=False)
    assert np.array_equal(gspo[1], grpo[1]) == (level == "sequence")


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(("beta", "top_entropy"), [(0.0, 1.0), (0.3, 1.0), (0.3, 0.4)])
def test_gmpo(old, beta, top_entropy):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an experimental part of TRL
        from trl.experimental.gmpo.gmpo_trainer import GMPOTrainer
    case, advantage = draw(6), np.linspace(-1, 1, N * K)
    case["truncated"][:] = False
    settings = GrpoSettings(0.4, 0.3, beta, loss="gmpo", top_entropy=top_entropy)
    arrays = {
        "logp": case["logp"],
        "entropy": case["entropy"],
        "mask": (np.arange(C) < case["lengths"][:, None]) * 1.0,
        "advantage": advantage,
        "ref": case["ref"],
        **({"old": case["old"]} if old else {}),
    }
    value, slope, _, metrics = trl_loss(
        arrays, GMPOTrainer, epsilon_low=0.4, epsilon_high=0.3, beta=beta, top_entropy_quantile=top_entropy
    )
    found = ours(case, settings, advantage.reshape(N, K), old=old, sampled=False)
    assert_close(found[0], value, 1e-9)
    assert_close(found[1], slope, 1e-9)
    assert np.abs(slope).max() > 1e-3
    for name in ("clip_low", "clip_high", "clipped"):
        assert_close(found[3][name], metrics[METRICS[name]], 1e-6, name)


def test_extreme_values_on_real_tokens_are_trls():
    """Log ratios of +-50 are finite on both sides, and the same."""
    case = draw(7)
    case["old"][:, ::2] += np.where(np.arange(N * K) % 2, 50.0, -50.0)[:, None]
    case["ref"][:, 1::2] += 50.0
    mask = (np.arange(C) < case["lengths"][:, None]) * 1.0
    advantage = np.linspace(-1, 1, N * K)
    for loss in LOSSES:
        arrays = {name: case[name] for name in ("logp", "entropy", "old", "ref")} | {
            "mask": mask,
            "advantage": advantage,
        }
        value, slope, _, _ = trl_loss(
            arrays, loss_type=loss, beta=0.1, use_bias_correction_kl=False, sapo_temperature_neg=1.0625
        )
        settings = GrpoSettings(beta=0.1, loss=loss, level="token", max_completion=9, sapo_tau=(1.0, 1.0625))
        found = ours(case, settings, advantage.reshape(N, K), old=True, sampled=False)
        assert_close(found[0], value, 1e-9, loss)
        assert_close(found[1], slope, 1e-9, loss)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.25, 0.4, 0.5, 0.8])
def test_the_chosen_tokens_are_trls(share):
    """Also where the rank of the quantile is whole but for rounding: the token at the edge is in or out."""
    for tokens in range(2, 60):
        entropy = np.random.default_rng(tokens).random((1, 1, tokens), np.float32)
        keep = np.ones((1, 1, tokens), bool)
        found = top_entropy_masks([entropy], [keep], share=share)[0]
        trainer = bare_trainer()
        expected = trainer.get_high_entropy_mask(torch.tensor(entropy[0]), torch.tensor(keep[0]), 1 - share)
        assert np.array_equal(found[0], expected.numpy()), tokens


# ------------------------------------------------------------------------------------------------- advantages


def rewards_of(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """[groups, k, 3] with values missing, completions without any, a group with one scored and a flat group."""
    rng = np.random.default_rng(seed)
    rewards = rng.normal(size=(6, 5, 3)) * rng.integers(1, 4, 3)
    rewards[rng.random(rewards.shape) < 0.15] = np.nan
    rewards[1, 2] = np.nan
    rewards[2, 1:] = np.nan
    rewards[3] = [0.5, 0.25, -2.0]
    return rewards, rng.random(3) + 0.5


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_advantages(scale, aggregation):
    for seed in range(20):
        rewards, weights = rewards_of(seed)
        theirs = trl_batch(
            rewards.reshape(-1, 3),
            group=5,
            weights=weights,
            scale_rewards=scale,
            multi_objective_aggregation=AGGREGATION[aggregation],
        )
        found = combined_advantages(rewards, weights, aggregation=aggregation, scale=scale)
        assert_close(found.value.reshape(-1), theirs["advantages"], 1e-6)
        assert found.flat.tolist() == [False, False, True, True, False, False]


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_leave_one_out_with_the_penalty_in_the_reward(beta, normalise):
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rewards = rng.normal(size=(6, 5))
        rewards[1, 2] = np.nan
        rewards[2, 1:] = np.nan
        lengths = rng.integers(1, C + 1, 30)
        lengths[0] = C
        logps = {"old": -rng.random((30, C)), "ref": -rng.random((30, C))}
        theirs = trl_batch(
            rewards.reshape(-1, 1),
            group=5,
            kind=RLOOTrainer,
            lengths=lengths,
            logps=logps,
            beta=beta,
            normalize_advantages=normalise,
        )
        weight = (np.arange(C) < lengths[:, None]).reshape(6, 5, C) * 1.0
        kl = kl_per_token(logps["old"].reshape(6, 5, C), logps["ref"].reshape(6, 5, C), weight)
        found = leave_one_out_advantages(rewards_less_kl(rewards, kl, beta=beta), normalise=normalise)
        assert_close(found.value.reshape(-1), theirs["advantages"], 1e-6)
