"""Rewards of a group -> advantages, on the host, over whole groups and before they are cut into micro-batches.

NaN (or any number that is not finite) marks a completion that could not be scored: it is left out of every mean and
deviation and gets advantage 0. A group of equal rewards gets exact zeros: rounding in its mean would otherwise leave
noise, which the division by a deviation near 0 blows up to about 6e-4.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlmalign.objectives.names import require_known
from vlmalign.shapes import Float

#: added to the standard deviation (NUMERICS of GRPO implementations: 1e-4)
EPSILON = 1e-4

SCALES = ("none", "group", "batch")
AGGREGATIONS = ("sum_then_normalise", "normalise_then_sum")

#: weighted sums of equal rewards may differ by rounding: this many units in the last place are no difference
ROUNDING = 8 * np.finfo(np.float64).eps


class Advantages(NamedTuple):
    """`value` is 0 where a completion has no reward; `flat` marks groups whose rewards are all equal."""

    value: Float[np.ndarray, "groups k"]
    flat: np.ndarray  #: [groups] bool


def group_advantages(rewards: Float[np.ndarray, "groups k"], *, scale: str = "none", ddof: int = 1) -> Advantages:
    """A = (r - mean_g) / s: s = 1 (Dr. GRPO, arXiv 2503.20783), std_g + 1e-4 (GRPO, arXiv 2402.03300), or std of the batch.

    Standard deviations divide by n - `ddof`: 1 is Bessel's, 0 the population's (BalancedBio, Algorithm 1).

    >>> group_advantages(np.array([[1.0, 0.0], [0.7, 0.7]])).value.tolist()
    [[0.5, -0.5], [0.0, 0.0]]
    """
    require_known("reward scale", scale, SCALES)
    _check_ddof(ddof)
    r, known = _known(rewards)
    centred = _centred(r, known)
    flat = _flat(r, known)
    if scale == "group":
        centred = centred / (_deviation(r, known, ddof) + EPSILON)
    elif scale == "batch":
        every = r[known]
        spread = every.std(ddof=ddof) if every.size > ddof else 0.0
        centred = centred / (spread + EPSILON)
    centred[flat] = 0.0
    return Advantages(centred.astype(np.float32), flat)


def leave_one_out_advantages(rewards: Float[np.ndarray, "groups k"], *, normalise: bool = False) -> Advantages:
    """RLOO: A_i = r_i - mean of the others' rewards (arXiv 2402.14740).

    With `normalise`, (A - mean) / (std + 1e-4) over the scored completions of the batch, Bessel's deviation.

    >>> leave_one_out_advantages(np.array([[3.0, 0.0, 0.0]])).value.tolist()
    [[3.0, -1.5, -1.5]]
    """
    r, known = _known(rewards)
    count = known.sum(axis=1, keepdims=True)
    # r_i - (sum - r_i) / (n - 1) = (r_i - mean) n / (n - 1), without the cancellation
    value = _centred(r, known) * count / np.maximum(count - 1, 1)
    flat = _flat(r, known)
    scored = known & (count > 1)
    if normalise and scored.sum() > 1:
        every = value[scored]
        value = np.where(scored, (value - every.mean()) / (every.std(ddof=1) + EPSILON), 0.0)
    value[flat] = 0.0
    return Advantages(value.astype(np.float32), flat)


def combined_advantages(
    rewards: Float[np.ndarray, "groups k m"],
    weights: Float[np.ndarray, "weights"] | None = None,
    *,
    aggregation: str = "sum_then_normalise",
    scale: str = "none",
    ddof: int = 1,
) -> Advantages:
    """Advantages from m rewards per completion, whose weights default to 1.

    sum_then_normalise: `group_advantages` of r = sum_k w_k R_k, with `scale`. normalise_then_sum: each reward is
    normalised within its group, z_k = (R_k - mean_g) / (std_g + 1e-4), and A = sum_k w_k z_k is normalised over the
    batch (GDPO, arXiv 2601.05242); `scale` has no part in it. A reward that is NaN adds nothing to its completion's
    sum; a completion whose rewards are all NaN is not scored.
    """
    require_known("aggregation of rewards", aggregation, AGGREGATIONS)
    r = np.asarray(rewards, np.float64)
    weights = np.ones(r.shape[-1]) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != r.shape[-1:] or not np.isfinite(weights).all():
        raise ValueError(f"expected one finite weight for each of {r.shape[-1]} rewards, found {weights.tolist()}")
    scored = np.isfinite(r).any(axis=-1)
    if aggregation == "sum_then_normalise":
        total = np.where(np.isfinite(r), r, 0.0) @ weights
        return group_advantages(np.where(scored, total, np.nan), scale=scale, ddof=ddof)
    each = np.stack([group_advantages(r[..., k], scale="group", ddof=ddof).value for k in range(r.shape[-1])], axis=-1)
    flat = np.all([_flat(*_known(r[..., k])) | (weights[k] == 0) for k in range(r.shape[-1])], axis=0)
    total = each.astype(np.float64) @ weights
    every = total[scored]
    if every.size > ddof:
        total = (total - every.mean()) / (every.std(ddof=ddof) + EPSILON)
    total[flat] = 0.0
    return Advantages(np.where(scored, total, 0.0).astype(np.float32), flat)


def _check_ddof(ddof: int) -> None:
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 1 (Bessel's deviation) or 0 (the population's), found {ddof}")


def _known(rewards: Float[np.ndarray, "groups k"]) -> tuple[np.ndarray, np.ndarray]:
    """Rewards in float64 with 0 where there is none, and where there is one."""
    r = np.asarray(rewards, np.float64)
    if r.shape[-1] < 2:
        raise ValueError(
            f"a group needs at least 2 completions to be compared with each other, found {r.shape[-1]}; "
            "raise the group size"
        )
    known = np.isfinite(r)
    return np.where(known, r, 0.0), known


def _centred(r: np.ndarray, known: np.ndarray) -> np.ndarray:
    count = np.maximum(known.sum(axis=1, keepdims=True), 1)
    return np.where(known, r - r.sum(axis=1, keepdims=True) / count, 0.0)


def _deviation(r: np.ndarray, known: np.ndarray, ddof: int) -> np.ndarray:
    """[groups, 1]"""
    count = known.sum(axis=1, keepdims=True)
    return np.sqrt((_centred(r, known) ** 2).sum(axis=1, keepdims=True) / np.maximum(count - ddof, 1))


def _flat(r: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Groups whose known rewards are all equal (one alone, or none, is too)."""
    lowest = np.where(known, r, np.inf).min(axis=1)
    highest = np.where(known, r, -np.inf).max(axis=1)
    size = np.abs(r).max(axis=1)
    return ~(highest > lowest + ROUNDING * size)
