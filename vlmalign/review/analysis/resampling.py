"""Intervals of ratios by resampling readers and cases: the pigeonhole bootstrap.

    ratio* = sum_i w_r(i) v_c(i) y_i / sum_i w_r(i) v_c(i) m_i

with w and v the counts of readers and of cases drawn with replacement (McCullagh, Bernoulli 6:285, 2000; Owen, Ann. Appl.
Stat. 1:386, 2007, who shows that it is slightly conservative). Intervals are percentiles. A draw in which the denominator
is 0 is left out of that interval.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

DRAWS = 2000
LEVEL = 0.95
_AT_ONCE = 4_000_000  #: numbers that are held at once


class Interval(NamedTuple):
    value: float | None  #: None: nothing was observed
    low: float | None  #: None with fewer than 2 readers or 2 cases
    high: float | None
    n: int  #: what the denominator counts


class Ratios(NamedTuple):
    """Ratios and their draws."""

    value: np.ndarray  #: [ratios], NaN where the denominator is 0
    drawn: np.ndarray  #: [draws, ratios]; empty with fewer than 2 readers or 2 cases
    n: np.ndarray  #: [ratios]

    def interval(self, i: int) -> Interval:
        return _interval(self.value[i], self.drawn[:, i], int(self.n[i]))

    def difference(self, i: int, j: int) -> Interval:
        """Of ratio i and ratio j, in the same draws."""
        return _interval(
            self.value[i] - self.value[j], self.drawn[:, i] - self.drawn[:, j], int(min(self.n[i], self.n[j]))
        )


def ratios(
    above: np.ndarray, below: np.ndarray, reader: np.ndarray, case: np.ndarray, *, draws: int = DRAWS, seed: int = 0
) -> Ratios:
    """sum(above) / sum(below) of each row [ratios, n], where vote i is of reader [n] on case [n] (numbers from 0)."""
    shape = (len(above), int(reader.max()) + 1, int(case.max()) + 1)
    cells = []
    for values in (above, below):
        table = np.zeros(shape)
        np.add.at(table, (slice(None), reader, case), values)
        cells.append(table)
    totals = [table.sum((1, 2)) for table in cells]
    with np.errstate(invalid="ignore", divide="ignore"):
        value = totals[0] / totals[1]
        if min(shape[1:]) < 2:
            return Ratios(value, np.zeros((0, len(above))), totals[1].astype(int))
        chance = np.random.default_rng(seed)
        found = []
        at_once = max(1, _AT_ONCE // (shape[0] * shape[2]))
        for start in range(0, draws, at_once):
            n = min(at_once, draws - start)
            readers, cases = (chance.multinomial(size, np.full(size, 1 / size), n).astype(float) for size in shape[1:])
            sums = [np.einsum("dr,src,dc->ds", readers, table, cases, optimize=True) for table in cells]
            found.append(sums[0] / sums[1])
    return Ratios(value, np.concatenate(found), totals[1].astype(int))


def _interval(value: float, drawn: np.ndarray, n: int) -> Interval:
    if not np.isfinite(value):
        return Interval(None, None, None, n)
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):
        return Interval(float(value), None, None, n)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high), n)
