"""Winning shares of arms and rates of pairs of arms, with intervals over readers and cases.

winning share   pages on which the arm was preferred / pages on which it was shown (ties and "none" stay below the line)
points          (wins + ties / 2) / comparisons of the arm with all others
pairwise rate   the same of two arms; .5 means no difference
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from vlmalign.review.analysis.ballots import Ballot
from vlmalign.review.analysis.pairs import POINTS, Pairs, numbered
from vlmalign.review.analysis.resampling import DRAWS, Interval, ratios
from vlmalign.review.form import NONE, TIE


class ArmShare(NamedTuple):
    arm: str
    shown: int  #: pages
    preferred: int
    ties: int
    none: int
    share: Interval
    points: Interval


class PairRate(NamedTuple):
    arm: str
    other: str
    wins: int
    ties: int
    losses: int
    rate: Interval
    difference: Interval  #: of the two winning shares


def arm_shares(
    ballots: Sequence[Ballot], compared: Pairs, arms: Sequence[str], *, draws: int = DRAWS, seed: int = 0
) -> tuple[list[ArmShare], list[PairRate]]:
    """Each arm, and each pair of arms that met on a page (first arm before second, in the order given)."""
    readers, cases = numbered(each.reader for each in ballots), numbered(each.case for each in ballots)
    where = (
        np.array([readers[each.reader] for each in ballots]),
        np.array([cases[each.case] for each in ballots]),
    )
    shown = np.array([[arm in each.shown for each in ballots] for arm in arms])
    won = np.array([[arm == each.winner for each in ballots] for arm in arms])
    said = np.array([each.choice if isinstance(each.choice, str) else "" for each in ballots])
    shares = ratios(won, shown, *where, draws=draws, seed=seed)

    # The rows of comparisons: points of each arm against all others, then of each pair.
    met = [(i, j) for i, j in combinations(range(len(arms)), 2) if len(compared.between(i, j)[0])]
    above = np.zeros((len(arms) + len(met), len(compared.first)))
    below = np.zeros_like(above)
    for i in range(len(arms)):
        for rows, points in ((compared.first == i, POINTS), (compared.second == i, 1 - POINTS)):
            above[i, rows], below[i, rows] = points[compared.result[rows]], 1.0
    for place, (i, j) in enumerate(met, start=len(arms)):
        rows, points = compared.between(i, j)
        above[place, rows], below[place, rows] = points, 1.0
    points = ratios(above, below, compared.reader, compared.case, draws=draws, seed=seed)

    found = [
        ArmShare(
            arm,
            int(shown[i].sum()),
            int(won[i].sum()),
            int((shown[i] & (said == TIE)).sum()),
            int((shown[i] & (said == NONE)).sum()),
            shares.interval(i),
            points.interval(i),
        )
        for i, arm in enumerate(arms)
    ]
    rates = []
    for place, (i, j) in enumerate(met, start=len(arms)):
        own = compared.between(i, j)[1]
        counts = [int((own == value).sum()) for value in POINTS]
        rates.append(PairRate(arms[i], arms[j], *counts, points.interval(place), shares.difference(i, j)))
    return found, rates
