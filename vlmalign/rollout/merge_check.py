"""How far the policy that sampled is from the policy that is trained, token by token.

Rollouts run on a copy with the adapter merged into the weights and on other programs than training. Both take the same
log-probabilities up to rounding (in bfloat16 the merged weights themselves are rounded): a larger gap means that the
copy is stale or merged wrongly, and importance ratios would be wrong with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Bool, Float

#: mean gap in nat per token, by the dtype of the model, above which it is more than rounding. configs/models/tiny-medgemma
#: after a short SFT, on a CPU: 0.004 to 0.006 in bfloat16, below 1e-6 in float32
MORE_THAN_ROUNDING: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 0.05}
#: mean gap in nat per token above which the copy is another policy, and nothing could be learnt from its completions
ANOTHER_POLICY = 0.5


class LogpGap(NamedTuple):
    """|log-probability as sampled - as scored|, nat."""

    largest: float
    mean: float
    tokens: int


def logp_gap(
    sampled: Sequence[Float[np.ndarray, "_ _ _"]],
    scored: Sequence[Float[np.ndarray, "_ _ _"]],
    real: Sequence[Bool[np.ndarray, "_ _ _"]],
) -> LogpGap:
    """The gap over the real tokens of all batches: log-probabilities recorded while sampling with the merged copy,
    and those that the unmerged model gives the same tokens at the same temperature.

    Raises:
        ValueError: when no token is real.
    """
    gaps = [np.abs(a.astype(np.float64) - b)[mask] for a, b, mask in zip(sampled, scored, real, strict=True)]
    every = np.concatenate(gaps) if gaps else np.zeros(0)
    if not every.size:
        raise ValueError("no tokens to compare the merged policy on; give batches with completions")
    return LogpGap(float(every.max()), float(every.mean()), every.size)


def judge_gap(mean: float, dtype: str) -> str | None:
    """A warning about a mean gap (nat per token) that is more than rounding in this dtype; None when it is not.

    NaN is no gap: a step whose numbers are not finite changes nothing, and is counted elsewhere.

    Raises:
        ValueError: when the gap says that another policy was sampled from than is trained.
    """
    if mean > ANOTHER_POLICY:
        raise ValueError(
            f"completions were sampled from another policy than the one that is trained: their log-probabilities differ "
            f"by {mean:.3g} nat per token, where rounding in {dtype} stays below {MORE_THAN_ROUNDING[dtype]}; the merged "
            "weights are stale or wrong"
        )
    if mean > MORE_THAN_ROUNDING[dtype]:
        return (
            f"log-probabilities of sampled tokens differ by {mean:.3g} nat per token between the merged weights and the "
            f"adapter beside its base, more than rounding in {dtype} explains ({MORE_THAN_ROUNDING[dtype]}); see "
            "rollout_gap in the metrics, and objective.correction for a bound on the ratios it distorts"
        )
    return None
