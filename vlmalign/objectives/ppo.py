"""Proximal policy optimisation with a value head: BalancedBio's ablation of GRPO.

Over the loss tokens of the whole optimiser batch, with c = exp(logp - old_logp), token advantages A and returns R:

    L = mean_t[ -min(c A, clip(c, 1 - eps_low, 1 + eps_high) A) + beta KL_t ]
        + value_coef mean_t[ 1/2 max((V - R)^2, (V_clipped - R)^2) ] - entropy_coef mean_t[ H ]
    V_clipped = old V held to within value_clip of it

Policy clip: arXiv 1707.06347, eq. 7; value clip: its reference code ("PPO2", see arXiv 2005.12729, sec. 3). A and R
come from `gae.py`, and A is whitened there, over the whole batch. The KL penalty is either in the rewards
(`gae.token_rewards`) or here (beta > 0), as in GRPO: `kl.py` says what the estimators mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from vlmalign.objectives.kl import ESTIMATORS, kl_estimate
from vlmalign.objectives.names import require_known
from vlmalign.objectives.ratio import clamp, gap, safe_exp
from vlmalign.objectives.surrogates import clip_surrogate
from vlmalign.types import GroupBatch, LossParts, Scores

#: fields of `Scores` that must be recorded before the first update on a rollout
RECORDED = ("old_logp", "old_values", "returns", "advantage")


@dataclass(frozen=True)
class PpoSettings:
    """`value_clip` is in units of the reward; None leaves the value loss unclipped."""

    clip_low: float = 0.2  #: distance of the ratio from 1
    clip_high: float = 0.2
    value_clip: float | None = 0.2
    value_coef: float = 0.1
    beta: float = 0.0  #: weight of the KL penalty in the loss; 0 needs no reference pass
    kl: str = "k3"  #: a member of `kl.ESTIMATORS`
    entropy_coef: float = 0.0

    def __post_init__(self) -> None:
        require_known("KL estimator", self.kl, ESTIMATORS)
        if not 0 <= self.clip_low < 1 or self.clip_high < 0:
            raise ValueError(
                f"clip bounds must satisfy 0 <= clip_low < 1 and clip_high >= 0; "
                f"found {self.clip_low} and {self.clip_high}"
            )
        if self.value_clip is not None and self.value_clip <= 0:
            raise ValueError(f"value_clip must be > 0, or null for no clip; found {self.value_clip}")
        for name in ("value_coef", "beta", "entropy_coef"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, found {getattr(self, name)}")


def ppo_loss(scores: Scores, batch: GroupBatch, *, settings: PpoSettings) -> LossParts:
    """Parts "policy", "value" and, with a bonus, "entropy": sums over tokens, each with its coefficient.

    `scores.values` is the value head now; `RECORDED` fields come from the start of the optimiser batch.
    """
    missing = [name for name in ("values", *RECORDED) if getattr(scores, name) is None]
    if missing:
        raise ValueError(f"PPO needs Scores.{', Scores.'.join(missing)}; see objectives/gae.py")
    scores = jax.tree.map(jnp.asarray, scores)
    weight = jnp.asarray(batch.weight)
    mask = weight > 0
    count = jnp.sum(weight)

    advantage = jnp.where(mask, scores.advantage, 0.0)
    log_ratio = gap(scores.logp, scores.old_logp, mask)
    ratio = safe_exp(log_ratio)
    low, high = settings.clip_low, settings.clip_high
    surrogate = clip_surrogate(ratio, advantage, low=low, high=high, delta=None)
    per_token = -surrogate
    under, over = (ratio < 1 - low) & (advantage < 0), (ratio > 1 + high) & (advantage > 0)

    error = gap(scores.values, scores.returns, mask)
    squared = error**2
    if settings.value_clip is not None:
        change = gap(scores.values, scores.old_values, mask)
        held = clamp(change, -settings.value_clip, settings.value_clip) + gap(scores.old_values, scores.returns, mask)
        # Within the clip the two errors are one; computed apart they would differ by rounding.
        clipped = jnp.where(jnp.abs(change) > settings.value_clip, held, error) ** 2
        squared = jnp.maximum(squared, clipped)
    metrics = {
        "surrogate": jnp.sum(weight * surrogate),
        "ratio": jnp.sum(weight * ratio),
        "clip_low": jnp.sum(weight * under),
        "clip_high": jnp.sum(weight * over),
        "clipped": jnp.sum(weight * (under | over)),
        "kl_old": jnp.sum(weight * (ratio - 1 - log_ratio)),
        "value": jnp.sum(weight * jnp.where(mask, scores.values, 0.0)),
        "value_error": jnp.sum(weight * error**2),
        "value_clipped": jnp.sum(weight * (squared > error**2)),
        "return": jnp.sum(weight * jnp.where(mask, scores.returns, 0.0)),
    }
    if settings.beta > 0:
        if scores.ref_logp is None:
            raise ValueError(f"beta {settings.beta} compares with a reference policy; Scores.ref_logp was not given")
        penalty = kl_estimate(gap(scores.ref_logp, scores.logp, mask), settings.kl)
        per_token = per_token + settings.beta * penalty
        metrics["kl"] = jnp.sum(weight * penalty)
    sums = {
        "policy": jnp.sum(weight * per_token),
        "value": settings.value_coef * 0.5 * jnp.sum(weight * squared),
    }
    if scores.entropy is not None:
        entropy = jnp.sum(weight * jnp.where(mask, scores.entropy, 0.0))
        metrics["entropy"] = entropy
        if settings.entropy_coef > 0:
            sums["entropy"] = -settings.entropy_coef * entropy
    elif settings.entropy_coef > 0:
        raise ValueError("an entropy bonus needs Scores.entropy; it was not given")
    return LossParts(sums, jax.lax.stop_gradient({name: (value, count) for name, value in metrics.items()}))


def ppo_counts(batches: Sequence[GroupBatch], *, settings: PpoSettings) -> dict[str, float]:
    """Loss tokens of the whole optimiser batch (host arrays), for every part."""
    tokens = float(sum(np.sum(b.weight, dtype=np.float64) for b in batches))
    parts = ("policy", "value", "entropy") if settings.entropy_coef > 0 else ("policy", "value")
    return dict.fromkeys(parts, tokens)
