"""A mean over votes of readers on cases, with a standard error that knows that both are drawn: the two-way cluster sandwich.

    V = V_readers + V_cases - V_both        (Cameron, Gelbach and Miller 2011, J. Bus. Econ. Stat. 29:238, eq. 2.8)

of residuals e = y - mean: V_g = G/(G - 1) sum over clusters g of (sum of e in g)^2 / n^2. Where V is not above the larger of
its first two parts, that part is taken (their section 2.4 asks for a variance that is not negative; this is the
cautious choice). Intervals use t of min(readers, cases) - 1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class TwoWay(NamedTuple):
    """Of each study: arrays of the leading shape of the values."""

    mean: np.ndarray
    error: np.ndarray  #: standard error
    df: int  #: degrees of freedom of t


def two_way_mean(values: np.ndarray, seen: np.ndarray) -> TwoWay:
    """The mean of `values` [..., readers, cases] where `seen` [readers, cases] is true.

    Raises:
        ValueError: with fewer than 2 readers or 2 cases: then nothing is known of one of the variances.
    """
    readers, cases = seen.any(1).sum(), seen.any(0).sum()
    if min(readers, cases) < 2:
        raise ValueError(f"a two-way error needs at least 2 readers and 2 cases, found {readers} and {cases}")
    n = seen.sum()
    mean = np.where(seen, values, 0.0).sum((-2, -1)) / n
    residual = np.where(seen, values - mean[..., None, None], 0.0)
    by_reader = (residual.sum(-1) ** 2).sum(-1) * readers / (readers - 1)
    by_case = (residual.sum(-2) ** 2).sum(-1) * cases / (cases - 1)
    both = (residual**2).sum((-2, -1)) * n / (n - 1)
    larger = np.maximum(by_reader, by_case)
    variance = np.maximum(by_reader + by_case - both, larger) / n**2
    return TwoWay(mean, np.sqrt(variance), int(min(readers, cases)) - 1)
