"""Tests without a model, on averages: one number per case (over readers) or per reader (over cases), never votes.

Votes on a case are not independent of each other, nor are votes of a reader; their averages over the other are one number
each. Wilcoxon's signed-rank test and the sign test are scipy's; zeros are split (Pratt) in the first and left out in the second.
What the tests of cases say holds for these readers, and what those of readers say for these cases.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from vlmalign.review.analysis.ballots import Rating
from vlmalign.review.analysis.pairs import Pairs

Unit = Literal["cases", "readers"]
UNITS: tuple[Unit, ...] = ("cases", "readers")


class Paired(NamedTuple):
    """A test of averages against 0; positive differences favour `arm`, or give it the higher level."""

    outcome: str
    arm: str
    other: str
    unit: Unit
    n: int  #: units
    median: float  #: of the averages
    above: int
    below: int
    wilcoxon: float | None  #: p; None without a difference
    sign: float | None


def preference_differences(compared: Pairs, arm: int, other: int, unit: Unit) -> np.ndarray:
    """Points of `arm` less 1/2, averaged within each unit [units]."""
    rows, points = compared.between(arm, other)
    groups = compared.case[rows] if unit == "cases" else compared.reader[rows]
    return _means(zip(groups.tolist(), (points - 0.5).tolist(), strict=True))


def rating_differences(ratings: Sequence[Rating], outcome: str, arm: str, other: str, unit: Unit) -> np.ndarray:
    """Level of `arm` less that of `other` on the same page, averaged within each unit [units]."""
    pages: Mapping[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for rating in ratings:
        if outcome in rating.levels:
            pages[rating.reader, rating.case][rating.arm] = rating.levels[outcome]
    return _means(
        (case if unit == "cases" else reader, levels[arm] - levels[other])
        for (reader, case), levels in pages.items()
        if arm in levels and other in levels
    )


def paired_tests(differences: np.ndarray, outcome: str, arm: str, other: str, unit: Unit) -> Paired:
    """Both tests of averages [units]."""
    above, below = int((differences > 0).sum()), int((differences < 0).sum())
    wilcoxon = sign = None
    if above + below:
        wilcoxon = float(stats.wilcoxon(differences, zero_method="pratt").pvalue)
        sign = float(stats.binomtest(above, above + below).pvalue)
    return Paired(
        outcome, arm, other, unit, len(differences), float(np.median(differences)), above, below, wilcoxon, sign
    )


def holm(p: Sequence[float | None]) -> list[float | None]:
    """P-values adjusted for their number (Holm, Scand. J. Stat. 6:65, 1979); None stays None and is not counted."""
    from statsmodels.stats.multitest import multipletests

    known = [i for i, value in enumerate(p) if value is not None]
    found: list[float | None] = [None] * len(p)
    if known:
        for i, value in zip(known, multipletests([p[i] for i in known], method="holm")[1], strict=True):
            found[i] = float(value)
    return found


def _means(values: Iterable[tuple[object, float]]) -> np.ndarray:
    groups = defaultdict(list)
    for group, value in values:
        groups[group].append(value)
    return np.array([np.mean(own) for own in groups.values()], dtype=float)
