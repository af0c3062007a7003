"""How far readers agree with each other, and each with themselves.

Krippendorff's alpha    of all readers, any overlap (package krippendorff); nominal for preferences, ordinal for ratings;
                        the interval resamples cases with all that was said of them
weighted kappa          of each pair of readers, quadratic weights (Cohen 1968; scikit-learn), its mean and range
ICC(1)                  one-way random effects (Shrout and Fleiss, Psychol. Bull. 86:420, 1979); as readers differ from case to
                        case, with the mean number of ratings n0 of unequal groups (Donner, Int. Stat. Rev. 54:67, 1986)
consistency             of repeated cases: the share with the same answer, and kappa of first and second
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from typing import Literal, NamedTuple

import krippendorff
import numpy as np
from sklearn.metrics import cohen_kappa_score

from vlmalign.review.analysis.resampling import LEVEL, Interval

Unit = tuple[str, Hashable]  #: (case, what of it was judged)
Said = Mapping[Unit, Mapping[str, int]]  #: unit -> reader -> value, from 0
ALPHA_DRAWS = 1000


class Kappas(NamedTuple):
    """Of pairs of readers."""

    mean: float | None
    low: float | None  #: the lowest and the highest of the pairs
    high: float | None
    pairs: int  #: that share units, and do not both give one value alone


class Consistency(NamedTuple):
    reader: str  #: "all" for all together
    repeats: int
    same: int
    kappa: float | None


def alpha(
    said: Said, values: int, level: Literal["nominal", "ordinal"], *, draws: int = ALPHA_DRAWS, seed: int = 0
) -> Interval:
    """Krippendorff's alpha; n counts units with two readers or more. Undefined where all values are the same."""
    counts: dict[str, list[np.ndarray]] = defaultdict(list)
    for (case, _), by_reader in said.items():
        if len(by_reader) > 1:
            counts[case].append(np.bincount(list(by_reader.values()), minlength=values))
    groups = [np.array(own) for _, own in sorted(counts.items())]
    n = sum(len(own) for own in groups)
    value = _alpha(groups, level)
    if value is None or len(groups) < 2:
        return Interval(value, None, None, n)
    chance = np.random.default_rng(seed)
    drawn = [_alpha([groups[i] for i in chance.integers(len(groups), size=len(groups))], level) for _ in range(draws)]
    low, high = np.quantile([each for each in drawn if each is not None], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), n)


def _alpha(groups: Sequence[np.ndarray], level: str) -> float | None:
    if not groups:
        return None
    counts = np.concatenate(groups)
    if (counts.sum(0) > 0).sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement=level))


def pairwise_kappa(said: Said, values: int, *, weights: Literal["quadratic"] | None = "quadratic") -> Kappas:
    """Cohen's kappa of each pair of readers on what both judged."""
    shared: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    for by_reader in said.values():
        for pair in combinations(sorted(by_reader), 2):
            shared[pair].append((by_reader[pair[0]], by_reader[pair[1]]))
    found = [value for own in shared.values() if (value := kappa(own, values, weights=weights)) is not None]
    if not found:
        return Kappas(None, None, None, 0)
    return Kappas(float(np.mean(found)), min(found), max(found), len(found))


def kappa(
    given: Sequence[tuple[int, int]], values: int, *, weights: Literal["quadratic"] | None = None
) -> float | None:
    """Cohen's kappa of pairs of values; None where it is undefined: no pair, or one value alone."""
    if len({value for pair in given for value in pair}) < 2:
        return None
    return float(cohen_kappa_score(*zip(*given, strict=True), labels=range(values), weights=weights))


def icc(said: Said) -> float | None:
    """ICC(1) of single ratings; None with fewer than two units, no unit judged twice, or no variation."""
    groups = [np.array(list(by_reader.values()), dtype=float) for by_reader in said.values() if len(by_reader) > 1]
    if len(groups) < 2:
        return None
    sizes = np.array([len(own) for own in groups])
    means, everything = np.array([own.mean() for own in groups]), np.concatenate(groups)
    between = (sizes * (means - everything.mean()) ** 2).sum() / (len(groups) - 1)
    within = sum(((own - own.mean()) ** 2).sum() for own in groups) / (sizes.sum() - len(groups))
    n0 = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(groups) - 1)
    below = between + (n0 - 1) * within
    return float((between - within) / below) if below else None


def consistency(
    given: Sequence[tuple[str, int, int]], values: int, *, weights: Literal["quadratic"] | None = None
) -> list[Consistency]:
    """Of (reader, first value, second value): each reader, and all together last; empty without a repetition."""
    by_reader: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for reader, first, second in given:
        by_reader[reader].append((first, second))
    groups = (
        [*sorted(by_reader.items()), ("all", [pair for own in by_reader.values() for pair in own])] if given else []
    )
    return [
        Consistency(reader, len(own), Counter(a == b for a, b in own)[True], kappa(own, values, weights=weights))
        for reader, own in groups
    ]
