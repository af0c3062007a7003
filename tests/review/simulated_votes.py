"""Votes of invented readers whose preferences are known: what the tests of the analysis share."""

import numpy as np

from vlmalign.review.analysis.ballots import Ballot


def simulate(
    chance: np.random.Generator,
    strengths: dict[str, float],
    *,
    readers: int,
    cases: int,
    side: float = 0.0,
    length: float = 0.0,
    tie: float | None = None,
    spread: tuple[float, float] = (0.0, 0.0),
):
    """(ballots, style): every reader on every case, two arms in turn, by the model of Davidson in log odds.

    `length` is the effect of a doubling; `spread`: standard deviations of readers' and cases' own liking of the first arm.
    """
    arms = list(strengths)
    style = {(f"c{c:04}", arm): (int(chance.integers(30, 400)), 0) for c in range(cases) for arm in arms}
    of_reader, of_case = (chance.normal(0, deviation, n) for deviation, n in zip(spread, (readers, cases), strict=True))
    ballots = []
    for c in range(cases):
        pair = [arms[c % len(arms)], arms[(c + 1) % len(arms)]]
        for r in range(readers):
            first, second = pair if chance.random() < 0.5 else pair[::-1]
            words = [1 + style[f"c{c:04}", arm][0] for arm in (first, second)]
            liking = (of_reader[r] + of_case[c]) * ((first == arms[0]) - (second == arms[0]))
            eta = strengths[first] - strengths[second] + side + length * np.log2(words[0] / words[1]) + liking
            weights = np.exp([eta / 2, -np.inf if tie is None else tie, -eta / 2])
            choice = [0, "tie", 1][chance.choice(3, p=weights / weights.sum())]
            ballots.append(Ballot(f"R{r:03}", f"c{c:04}", (first, second), choice))
    return ballots, style
