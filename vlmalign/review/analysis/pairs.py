"""Ballots as comparisons of two arms, in arrays, by a stated rule.

On a page with n answers the preferred one beats each of the other n - 1; of those nothing is known among themselves. "No
difference" and "none is acceptable" are ties of every pair on the page: neither answer was preferred to the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from vlmalign.review.analysis.ballots import Ballot, Style

WIN, TIED, LOSS = 0, 1, 2
POINTS = np.array([1.0, 0.5, 0.0])  #: of the first arm, by result

RULE = (
    "A preferred answer wins against every other answer of the page. “No difference” and “none is acceptable” are ties, "
    "half a point for either side; pages on which two answers are the same text give no ballot."
)


class Pairs(NamedTuple):
    """Comparisons; all arrays are [n]. Arms, readers and cases are numbers."""

    first: np.ndarray  #: the arm that stood first on the page
    second: np.ndarray
    result: np.ndarray  #: WIN of the first, TIED, LOSS
    reader: np.ndarray
    case: np.ndarray
    length: np.ndarray  #: log2 of (1 + words of the first) / (1 + words of the second)
    formatting: np.ndarray  #: the same of list marks, headings and emphasis

    def between(self, arm: int, other: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows of comparisons of the two arms, the points of `arm` in each)."""
        ahead = (self.first == arm) & (self.second == other)
        rows = np.flatnonzero(ahead | ((self.first == other) & (self.second == arm)))
        points = POINTS[self.result[rows]]
        return rows, np.where(ahead[rows], points, 1 - points)


def pairs(ballots: Sequence[Ballot], arms: Sequence[str], style: Style) -> Pairs:
    """Every comparison of the ballots."""
    readers, cases = numbered(each.reader for each in ballots), numbered(each.case for each in ballots)
    number = {arm: i for i, arm in enumerate(arms)}
    rows: list[tuple[float, ...]] = []
    for ballot in ballots:
        for i, j in combinations(range(len(ballot.shown)), 2):
            if isinstance(ballot.choice, int) and ballot.choice not in (i, j):
                continue
            result = TIED if ballot.winner is None else WIN if ballot.choice == i else LOSS
            a, b = ballot.shown[i], ballot.shown[j]
            ratio = np.log2((1 + np.array(style[ballot.case, a])) / (1 + np.array(style[ballot.case, b])))
            rows.append((number[a], number[b], result, readers[ballot.reader], cases[ballot.case], *ratio))
    table = np.array(rows, dtype=float).reshape(-1, 7).T
    return Pairs(*(column.astype(int) for column in table[:5]), *table[5:])


def numbered(names) -> dict[str, int]:
    """Name -> number, in alphabetical order."""
    return {name: i for i, name in enumerate(sorted(set(names)))}
