"""How far the policy that sampled is from the policy that is trained, token by token.

Rollouts run on a copy with the adapter merged into the weights and on other programs than training. Both take the same
log-probabilities up to rounding (in bfloat16 the merged weights themselves are rounded): a larger gap means that the
copy is stale or merged wrongly, and importance ratios would be wrong with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Bool, Float


class LogpGap(NamedTuple):
    """|log-probability as sampled - as scored|, nat."""

    largest: float
    mean: float
    tokens: int


def logp_gap(
    sampled: Sequence[Float[np.ndarray, "n k c"]],
    scored: Sequence[Float[np.ndarray, "n k c"]],
    real: Sequence[Bool[np.ndarray, "n k c"]],
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
