"""Rewards of a group -> advantages, on the host, over whole groups and before they are cut into micro-batches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Float

#: added to the standard deviation (NUMERICS of GRPO implementations: 1e-4)
EPSILON = 1e-4

SCALES = ("none", "group", "batch")


class Advantages(NamedTuple):
    """`value` is 0 where a completion has no reward; `flat` marks groups whose rewards are all equal."""

    value: Float[np.ndarray, "groups k"]
    flat: np.ndarray  #: [groups] bool


def group_advantages(rewards: Float[np.ndarray, "groups k"], *, scale: str = "none") -> Advantages:
    """A = (r - mean_g) / s: s = 1 (Dr. GRPO, arXiv 2503.20783), std_g + 1e-4 (GRPO, arXiv 2402.03300), or std of the batch.

    NaN marks a completion that could not be scored: it is left out of every mean and gets advantage 0. Standard
    deviations are Bessel's. A group of equal rewards gets exact zeros: rounding would otherwise leave 1e-4 of noise.

    >>> group_advantages(np.array([[1.0, 0.0], [0.7, 0.7]])).value.tolist()
    [[0.5, -0.5], [0.0, 0.0]]
    """
    if scale not in SCALES:
        raise ValueError(f"reward scale must be one of {', '.join(SCALES)}; found {scale!r}")
    r = np.asarray(rewards, np.float64)
    known = np.isfinite(r)
    count = known.sum(axis=1, keepdims=True)
    filled = np.where(known, r, 0.0)
    mean = filled.sum(axis=1, keepdims=True) / np.maximum(count, 1)
    centred = np.where(known, r - mean, 0.0)
    lowest = np.where(known, r, np.inf).min(axis=1)
    highest = np.where(known, r, -np.inf).max(axis=1)
    flat = ~(highest > lowest)
    if scale == "group":
        variance = (centred**2).sum(axis=1, keepdims=True) / np.maximum(count - 1, 1)
        centred = centred / (np.sqrt(variance) + EPSILON)
    elif scale == "batch":
        every = r[known]
        spread = every.std(ddof=1) if every.size > 1 else 0.0
        centred = centred / (spread + EPSILON)
    centred[flat] = 0.0
    return Advantages(centred.astype(np.float32), flat)
