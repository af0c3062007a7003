"""Bang's blinding index: how far guesses of who wrote an answer are better than chance.

    BI = (right - wrong / (m - 1)) / n

of n guesses of one arm, "I do not know" counted in n alone; m is the number of choices. With m = 2 this is the new index of
Bang, Ni and Davis (Controlled Clinical Trials 25:143-156, 2004): 0 is chance, 1 unblinded, below 0 guessed the wrong way. The
form for m > 2 is ours; it too is 0 on average for random guesses. The interval counts readers as the units, since one
reader's guesses go together: the sandwich variance of the mean over clusters, with t of readers - 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats


class Index(NamedTuple):
    value: float
    low: float | None  #: 95 % interval; None with fewer than 2 readers
    high: float | None
    guesses: int
    right: int
    wrong: int
    unknown: int
    readers: int


def blinding_index(guesses: Sequence[tuple[str, bool | None]], choices: int) -> Index:
    """The index of an arm from (reader, right, or None for "I do not know") of every guess of it.

    Raises:
        ValueError: without a guess, or with fewer than 2 choices.
    """
    if not guesses or choices < 2:
        raise ValueError(f"expected at least one guess among at least 2 choices, found {len(guesses)} among {choices}")
    scores = [(reader, 0.0 if right is None else 1.0 if right else -1.0 / (choices - 1)) for reader, right in guesses]
    n = len(scores)
    value = sum(score for _, score in scores) / n
    residuals: dict[str, float] = defaultdict(float)
    for reader, score in scores:
        residuals[reader] += score - value
    k = len(residuals)
    low = high = None
    if k > 1:
        error = math.sqrt(sum(r * r for r in residuals.values()) * k / (k - 1)) / n
        reach = float(stats.t.ppf(0.975, k - 1)) * error
        low, high = max(-1.0, value - reach), min(1.0, value + reach)
    counts = [right for _, right in guesses]
    return Index(value, low, high, n, counts.count(True), counts.count(False), counts.count(None), k)
