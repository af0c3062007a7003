"""The GRPO family of policy losses, exact over the whole optimiser batch however it is cut.

With the ratio c (per token, or one per sequence), the advantage A and a surrogate g(c, A) of `surrogates.py`:

    l_t = - g_t x off-policy mask x entropy mask x rollout ratio + beta KL_t
    L   = sum_t w_t l_t / D                                          (the KL is neither masked nor weighted)

    loss      g       D over the optimiser batch                  ratio per
    grpo      clip    sequence: mean over completions of the      token      arXiv 2402.03300, eq. 3
                      mean over their tokens
    gspo      clip    as grpo                                     sequence   arXiv 2507.18071
    bnpo      clip    loss tokens                                 token
    dapo      clip    loss tokens                                 token      arXiv 2503.14476, eq. 8
    dr_grpo   clip    completions x L_max                         token      arXiv 2503.20783
    luspo     clip    completions (of sums over tokens)           sequence   arXiv 2602.05261
    cispo     cispo   loss tokens                                 token      arXiv 2506.13585
    sapo      sapo    as grpo                                     token      arXiv 2511.20347
    vespo     vespo   loss tokens                                 token      arXiv 2602.10693
    gmpo      gmpo    as grpo                                     token      arXiv 2507.20673

Values and gradients are TRL 1.16's at one micro-batch. TRL's bnpo divides by the tokens of each micro-batch and its
per-sequence means by the completions of each micro-batch; here both run over the whole optimiser batch, which makes
bnpo and dapo the same. Under gspo and the like the ratio has one value per sequence but A, w and the KL are per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmalign.objectives import surrogates
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.objectives.kl import kl_estimate
from vlmalign.objectives.ratio import clamp, gap, importance_ratio, off_policy_mask, safe_exp
from vlmalign.objectives.rollout_correction import behaviour_logp, bounded_ratio, rollout_gap
from vlmalign.shapes import Array, Bool, Float
from vlmalign.types import GroupBatch, LossParts, Scores

Metrics = dict[str, tuple[Array, Array]]
Mean = Callable[[Array], tuple[Array, Array]]


def grpo_loss(scores: Scores, batch: GroupBatch, *, settings: GrpoSettings) -> LossParts:
    """Part "policy": minus the surrogate plus the penalty, summed over tokens; part "entropy" when there is a bonus.

    `scores.old_logp` None means one update per rollout: the old policy is the current one, and c = 1 with a gradient.
    With several updates it is recorded once, before the first.

    Metrics are (sum, count) over loss tokens, or over completions where a number belongs to a whole one. On-policy
    and without a penalty the loss is about 0 whatever is learnt: watch "surrogate", the gradient norm and the reward.
    """
    scores = jax.tree.map(jnp.asarray, scores)  # recorded ones may come as host arrays
    weight = jnp.asarray(loss_weight(batch, settings))
    mask = weight > 0
    advantage = jnp.asarray(batch.advantage)[..., None]
    logp = jnp.where(mask, scores.logp, 0.0)
    old = jax.lax.stop_gradient(logp) if scores.old_logp is None else scores.old_logp
    log_ratio = gap(logp, old, mask)
    ratio = importance_ratio(log_ratio, mask, level=settings.kind.level)
    rollout_ratio = None
    if settings.rollout is not None:
        drift = rollout_gap(old, behaviour_logp(scores, settings.rollout.support), mask)
        rollout_ratio = bounded_ratio(drift, mask, settings.rollout)

    terms = _Terms(logp, log_ratio, ratio, rollout_ratio, advantage, mask)
    tokens, completions = _means(weight, batch)
    per_ratio = completions if settings.kind.level == "sequence" else tokens

    surrogate = _surrogate(terms, batch, settings)
    metrics: Metrics = _clip_metrics(terms, settings, per_ratio, tokens, completions)
    if settings.off_policy_threshold is not None:
        behaviour = old if scores.rollout_logp is None else scores.rollout_logp
        keep = off_policy_mask(advantage, logp, behaviour, mask, threshold=settings.off_policy_threshold)
        surrogate = surrogate * keep
        metrics["off_policy_kept"] = completions(keep)
    if settings.top_entropy < 1 and settings.kind.surrogate != "gmpo":
        surrogate = surrogate * _entropy_mask(batch)
    if rollout_ratio is not None:
        per_rollout = completions if settings.rollout.mode.startswith("sequence") else tokens
        metrics["rollout_weight"] = per_rollout(rollout_ratio)
        if settings.kind.surrogate != "vespo":
            surrogate = surrogate * rollout_ratio
    per_token = -surrogate
    metrics["surrogate"] = tokens(surrogate)
    metrics["ratio"] = per_ratio(ratio)
    if settings.beta > 0:
        if scores.ref_logp is None:
            raise ValueError(f"beta {settings.beta} compares with a reference policy; Scores.ref_logp was not given")
        penalty = kl_estimate(gap(scores.ref_logp, logp, mask), settings.kl)
        if settings.kl_unbiased:
            penalty = penalty * ratio
        per_token = per_token + settings.beta * penalty
        metrics["kl"] = tokens(penalty)
    sums = {"policy": jnp.sum(_share(weight, settings) * per_token)}

    if scores.entropy is not None:
        entropy = jnp.where(mask, scores.entropy, 0.0)
        metrics["entropy"] = tokens(entropy)
        if settings.entropy_bonus:
            sums["entropy"] = -jnp.sum(entropy * _bonus_weight(weight, batch, settings))
    elif settings.entropy_bonus:
        raise ValueError("an entropy bonus needs Scores.entropy; it was not given")
    metrics |= _rollout_metrics(scores, old, mask, weight)
    return LossParts(sums, jax.lax.stop_gradient(metrics), grpo_maxima(scores, batch, settings=settings))


def grpo_counts(
    batches: Sequence[GroupBatch], *, settings: GrpoSettings, entropy_coef: float | None = None
) -> dict[str, float]:
    """What each part is divided by, over the whole optimiser batch (host arrays).

    The bonus's coefficient is part of its divisor, so that one that adapts (`entropy_coef`, from
    `entropy.applied_coefficient`) does not compile the step anew. An optimiser batch whose completions were all cut
    off, under `mask_truncated`, has a gradient of 0 rather than no divisor.
    """
    tokens = float(sum(np.sum(loss_weight(b, settings), dtype=np.float64) for b in batches))
    if settings.mask_truncated and any(np.any(np.asarray(b.weight) > 0) for b in batches):
        tokens = max(tokens, 1.0)
    completions = float(sum(int(np.sum(b.group_id >= 0)) * b.layout.group for b in batches))
    divisors = {
        "tokens": tokens,
        "sequence means": completions,
        "sequences": completions,
        "longest": completions * settings.max_completion,
    }
    counts = {"policy": divisors[settings.kind.divisor]}
    if settings.entropy_bonus:
        coefficient = settings.entropy_coef if entropy_coef is None else entropy_coef
        if settings.adaptive_entropy is not None and entropy_coef is None:
            raise ValueError("the entropy coefficient adapts: pass entropy_coef=applied_coefficient(state, settings)")
        focus = float(sum(np.sum(_bonus_weight(loss_weight(b, settings), b, settings)) for b in batches))
        counts["entropy"] = max(focus, 1.0) / coefficient if coefficient > 0 else float("inf")
    return counts


def grpo_maxima(scores: Scores, batch: GroupBatch, *, settings: GrpoSettings) -> dict[str, Float[Array, ""]]:
    """Largest |log ratio| to the old policy and to the rollout engine, nat; combined over micro-batches by max."""
    scores = jax.tree.map(jnp.asarray, scores)
    mask = jnp.asarray(loss_weight(batch, settings)) > 0
    old = scores.logp if scores.old_logp is None else scores.old_logp
    found = {"log_ratio_max": jnp.max(jnp.abs(gap(scores.logp, old, mask)))}
    for name, behaviour in (("rollout_gap_max", scores.rollout_logp), ("kept_gap_max", scores.kept_logp)):
        if behaviour is not None:
            found[name] = jnp.max(jnp.abs(rollout_gap(old, behaviour, mask)))
    return jax.lax.stop_gradient(found)


def loss_weight(batch: GroupBatch, settings: GrpoSettings) -> Float[Array | np.ndarray, "n k c"]:
    """The batch's weights, 0 for completions cut at the length limit where the settings leave those out."""
    if not settings.mask_truncated:
        return batch.weight
    if batch.truncated is None:
        raise ValueError("mask_truncated needs to know which completions were cut off; set GroupBatch.truncated")
    return batch.weight * (1.0 - batch.truncated[..., None].astype(np.float32))


class _Terms(NamedTuple):
    """What the surrogates are made of: [N, K, C], or [N, K, 1] where a number belongs to a whole sequence."""

    logp: Array
    log_ratio: Array
    ratio: Array
    rollout_ratio: Array | None
    advantage: Array
    mask: Array


def _surrogate(terms: _Terms, batch: GroupBatch, settings: GrpoSettings) -> Array:
    logp, log_ratio, ratio, _, advantage, mask = terms
    low, high = settings.clip_low, settings.clip_high
    match settings.kind.surrogate:
        case "clip":
            return surrogates.clip_surrogate(ratio, advantage, low=low, high=high, delta=settings.delta)
        case "cispo":
            return surrogates.cispo_surrogate(ratio, advantage, logp, high=high)
        case "sapo":
            positive, negative = settings.sapo_tau
            return surrogates.sapo_surrogate(ratio, advantage, tau_positive=positive, tau_negative=negative)
        case "gmpo":
            focus = mask if settings.top_entropy >= 1 else mask & _entropy_mask(batch)
            return surrogates.gmpo_ratio(log_ratio, advantage, focus, low=low, high=high) * advantage
    return _vespo_weight(terms, settings) * advantage * logp


def _vespo_weight(terms: _Terms, settings: GrpoSettings) -> Array:
    return surrogates.vespo_weight(
        terms.log_ratio,
        terms.rollout_ratio,
        terms.advantage,
        terms.mask,
        positive=settings.vespo_positive,
        negative=settings.vespo_negative,
    )


def _clip_metrics(terms: _Terms, settings: GrpoSettings, per_ratio: Mean, tokens: Mean, completions: Mean) -> Metrics:
    """Shares where the bound stops the gradient: below it with A < 0, above it with A > 0, and either."""
    x, advantage = terms.ratio, terms.advantage
    low, high, mean = 1 - settings.clip_low, 1 + settings.clip_high, per_ratio
    match settings.kind.surrogate:
        case "clip":
            x = clamp(x, high=settings.delta)
        case "gmpo":
            x, low, high, mean = terms.log_ratio, -settings.clip_low, settings.clip_high, tokens
        case "cispo":
            return {"clip_high": per_ratio((x > settings.clip_high) & (advantage > 0))}
        case "vespo":
            return {"vespo_weight": completions(_vespo_weight(terms, settings))}
        case "sapo":
            return {}
    under, over = (x < low) & (advantage < 0), (x > high) & (advantage > 0)
    return {"clip_low": mean(under), "clip_high": mean(over), "clipped": mean(under | over)}


def _rollout_metrics(scores: Scores, old: Array, mask: Array, weight: Array) -> Metrics:
    """Raw log ratios to the rollout engine, before any bound, over the tokens it recorded."""
    metrics: Metrics = {}
    for name, behaviour in (("rollout", scores.rollout_logp), ("kept", scores.kept_logp)):
        if behaviour is not None:
            known = weight * ~jnp.isnan(jnp.where(mask, behaviour, 0.0))
            drift, count = rollout_gap(old, behaviour, mask), jnp.sum(known)
            metrics[f"{name}_gap"] = (jnp.sum(known * jnp.abs(drift)), count)
            metrics[f"{name}_log_ratio"] = (jnp.sum(known * drift), count)
            metrics[f"{name}_ratio"] = (jnp.sum(known * safe_exp(drift)), count)
    return metrics


def _means(weight: Array, batch: GroupBatch) -> tuple[Mean, Mean]:
    """(sum, count) of a metric over loss tokens, and over completions (of rows that are not padding)."""
    real = jnp.broadcast_to((batch.group_id >= 0)[:, None, None], (*weight.shape[:2], 1)).astype(jnp.float32)
    return (
        lambda x: (jnp.sum(weight * x), jnp.sum(weight)),
        lambda x: (jnp.sum(real * x), jnp.sum(real)),
    )


def _share(weight: Array, settings: GrpoSettings) -> Array:
    """What a token's loss counts for: its weight, or its share of its own completion."""
    if settings.kind.divisor != "sequence means":
        return weight
    total = jnp.sum(weight, axis=-1, keepdims=True)
    return jnp.where(total > 0, weight / jnp.where(total > 0, total, 1.0), 0.0)


def _entropy_mask(batch: GroupBatch) -> Bool[Array | np.ndarray, "n k c"]:
    if batch.entropy_mask is None:
        raise ValueError(
            "top_entropy below 1 needs the tokens chosen over the whole optimiser batch: set GroupBatch.entropy_mask "
            "from entropy.top_entropy_masks"
        )
    return batch.entropy_mask


def _bonus_weight(weight: Array | np.ndarray, batch: GroupBatch, settings: GrpoSettings) -> Array | np.ndarray:
    """Tokens the entropy bonus acts on: those that carry the policy term."""
    real = (weight > 0).astype(np.float32)
    return real if settings.top_entropy >= 1 else real * _entropy_mask(batch)
