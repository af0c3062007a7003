"""Are probabilities shares? Reliability in bins of equal width, and the expected calibration error.

Bin m of M holds probabilities in ((m - 1) / M, m / M], and 0 lies in the first. With n_m entries, mean probability c_m
and share of positives a_m (Guo et al., On Calibration of Modern Neural Networks, 2017, eq. 3; Naeini et al., 2015):

    ECE = sum_m (n_m / n) |a_m - c_m|

An entry is a (film, label) pair. The ECE has no interval: it is biased upwards, the more the fewer the entries, and
resampling adds to the bias. The shares of the bins have intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.evaluation.bootstrap import Interval, bootstrap_ratio
from vlmalign.shapes import Bool, Float, Int

BINS = 10


class Bin(NamedTuple):
    """The entries whose probability lies in (low, high]."""

    low: float
    high: float
    n: int  #: entries
    mean: float  #: of their probabilities
    share: Interval  #: of positives among them


def expected_calibration_error(
    truth: Bool[np.ndarray, "*entry"], probability: Float[np.ndarray, "*entry"], *, bins: int = BINS
) -> float | None:
    """The ECE over all entries; None where there is none.

    >>> expected_calibration_error(np.array([True, False, True, True]), np.array([0.5, 0.5, 1.0, 1.0]))
    0.0
    """
    truth, probability = truth.ravel(), probability.ravel()
    if len(truth) == 0:
        return None
    place = bin_of(probability, bins)
    gaps = np.bincount(place, truth - probability, minlength=bins)  # n_m (a_m - c_m)
    return float(np.abs(gaps).sum() / len(truth))


def reliability(
    truth: Bool[np.ndarray, "film label"],
    probability: Float[np.ndarray, "film label"],
    patients: Sequence[str],
    *,
    bins: int = BINS,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[Bin]:
    """The bins that hold an entry, each with the interval of its share by patients; all labels together."""
    place = bin_of(probability, bins)
    found = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            hits, of = ((part & inside).sum(axis=1).tolist() for part in (truth, inside))
            share = bootstrap_ratio(hits, of, patients, draws=draws, level=level, seed=seed)
            count, mean = int(inside.sum()), float(probability[inside].mean())
            found.append(Bin(number / bins, (number + 1) / bins, count, mean, share))
    return found


def bin_of(probability: Float[np.ndarray, "*entry"], bins: int) -> Int[np.ndarray, "*entry"]:
    """The bin of each probability, counted from 0. Raises ValueError for one outside [0, 1]."""
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("expected probabilities between 0 and 1; found others")
    return np.searchsorted(np.linspace(0, 1, bins + 1)[1:-1], probability)
