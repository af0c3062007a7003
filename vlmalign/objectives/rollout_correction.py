"""Importance ratios that correct for a rollout engine whose probabilities are not the trainer's.

The engine samples with other kernels (and perhaps a truncated support) than the trainer scores with, so completions
come from a slightly other policy: rho = exp(old_logp - rollout_logp), with old_logp the trainer's own
log-probability of the same weights. The ratio is a constant of the loss: no gradient flows through it.

Truncated importance sampling: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"; masked: IcePop (arXiv 2510.18855). The four modes are TRL's, under the same names.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vlmalign.objectives.names import require_known
from vlmalign.objectives.ratio import clamp, gap, safe_exp, sequence_sum
from vlmalign.shapes import Array, Bool, Float
from vlmalign.types import Scores

MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
SUPPORTS = ("full", "kept")


@dataclass(frozen=True)
class RolloutCorrection:
    """How rho is bounded: truncated to [low, high], or set to 0 outside; per token, or as one product per sequence.

    `support` says what the completions' log-probabilities are taken over. "full" compares two distributions over
    the whole vocabulary (`Scores.rollout_logp`): rho is 1 up to the engines' numerical mismatch. "kept" compares
    with what was really sampled from under top-p or top-k (`Scores.kept_logp`): the mean of rho is then the mass
    that was kept, below 1, because nothing outside the kept tokens can ever be drawn. TRL with vLLM's processed
    log-probabilities is "kept".
    """

    mode: str = "sequence_mask"
    low: float | None = None
    high: float | None = 3.0
    support: str = "full"

    def __post_init__(self) -> None:
        require_known("rollout correction mode", self.mode, MODES)
        require_known("rollout correction support", self.support, SUPPORTS)
        low, high = self.low, self.high
        if (low is not None and low < 0) or (high is not None and high <= 0):
            raise ValueError(
                f"bounds of the rollout correction must satisfy low >= 0 and high > 0; found {low}, {high}"
            )
        if low is not None and high is not None and low >= high:
            raise ValueError(f"bounds of the rollout correction must satisfy low < high; found {low} and {high}")
        if low is None and high is None and self.mode.endswith("truncate"):
            raise ValueError(f"rollout correction {self.mode} truncates nothing without a bound; set low or high")


def behaviour_logp(scores: Scores, support: str) -> Float[Array, "n k c"]:
    """What the completions' tokens were recorded with; ValueError where it was not recorded."""
    found = scores.rollout_logp if support == "full" else scores.kept_logp
    if found is None:
        name = "rollout_logp" if support == "full" else "kept_logp"
        raise ValueError(f"the rollout correction over {support!r} support needs Scores.{name}; none was recorded")
    return found


def rollout_gap(
    old_logp: Float[Array, "n k c"], behaviour: Float[Array, "n k c"], mask: Bool[Array, "n k c"]
) -> Float[Array, "n k c"]:
    """log rho per token: 0 on padding and where nothing was recorded (NaN), so that rho is 1 there."""
    found = jax.lax.stop_gradient(gap(old_logp, behaviour, mask))
    return jnp.where(jnp.isnan(found), 0.0, found)


def bounded_ratio(
    log_ratio: Float[Array, "n k c"], mask: Bool[Array, "n k c"], settings: RolloutCorrection
) -> Float[Array, "n k _"]:
    """rho per token [N, K, C] or per sequence [N, K, 1] (the product over its tokens), bounded as the mode says."""
    rho = safe_exp(sequence_sum(log_ratio, mask) if settings.mode.startswith("sequence") else log_ratio)
    if settings.mode.endswith("truncate"):
        return clamp(rho, settings.low, settings.high)
    keep = jnp.ones_like(rho, dtype=bool)
    if settings.low is not None:
        keep &= rho >= settings.low
    if settings.high is not None:
        keep &= rho <= settings.high
    return jnp.where(keep, rho, 0.0)
