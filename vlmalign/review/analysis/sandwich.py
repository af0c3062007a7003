"""Estimates of a likelihood with errors that know that votes share readers and cases: the two-way cluster sandwich.

    V_g = A^-1 [G / (G - 1) sum over clusters g of s_g s_g'] A^-1,   s_g = sum of the scores of the votes in g
    V = V_readers + V_cases - V_both            (Cameron, Gelbach and Miller 2011, J. Bus. Econ. Stat. 29:238, eq. 2.8)

with A the observed information. As in two_way.py, a contrast has the largest of V, V_readers and V_cases as its variance, so
that it is never negative, and intervals and tests use t of min(readers, cases) - 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

FEWEST_READERS = 5  #: below it no interval over readers can be trusted


class Effect(NamedTuple):
    value: float
    error: float | None  #: standard error; None, as all that follows, with fewer than 2 readers or 2 cases
    low: float | None
    high: float | None
    p: float | None  #: two-sided, of no effect


@dataclass(frozen=True)
class Estimate:
    """Parameters by name, and their covariance in its parts [k, k]."""

    names: Sequence[str]
    values: np.ndarray
    by_reader: np.ndarray
    by_case: np.ndarray
    both: np.ndarray
    readers: int
    cases: int
    n: int  #: votes
    loglikelihood: float

    @property
    def df(self) -> int:
        return min(self.readers, self.cases) - 1

    def effect(self, contrast: Mapping[str, float]) -> Effect:
        """Of a sum of parameters, by name -> weight; what is not a parameter (the reference arm) is 0."""
        c = np.array([contrast.get(name, 0.0) for name in self.names])
        value = float(c @ self.values)
        if self.df < 1:
            return Effect(value, None, None, None, None)
        reader, case, both = (float(c @ part @ c) for part in (self.by_reader, self.by_case, self.both))
        error = float(np.sqrt(max(reader + case - both, reader, case)))
        if error == 0:
            return Effect(value, 0.0, value, value, None)
        reach = float(stats.t.ppf(0.975, self.df)) * error
        return Effect(value, error, value - reach, value + reach, float(2 * stats.t.sf(abs(value) / error, self.df)))


def estimate(
    names: Sequence[str],
    values: np.ndarray,
    information: np.ndarray,
    scores: np.ndarray,
    reader: np.ndarray,
    case: np.ndarray,
    loglikelihood: float,
) -> Estimate:
    """From the observed information [k, k] and the scores [n, k] at the maximum; reader and case of each vote [n]."""
    bread = np.linalg.inv(information)
    clusters = reader, case, np.unique(np.stack([reader, case]), axis=1, return_inverse=True)[1].ravel()
    parts = [bread @ _meat(scores, cluster) @ bread for cluster in clusters]
    counts = [len(np.unique(cluster)) for cluster in clusters[:2]]
    return Estimate(names, values, *parts, *counts, len(scores), loglikelihood)


def _meat(scores: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """G / (G - 1) sum of s_g s_g'."""
    _, number = np.unique(cluster, return_inverse=True)
    count = number.max() + 1
    sums = np.zeros((count, scores.shape[1]))
    np.add.at(sums, number, scores)
    return sums.T @ sums * (count / max(count - 1, 1))
