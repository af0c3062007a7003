"""Which labels are named together: the log odds ratio of every pair, in answers, in their truth and in a training table.

A pair's films fall into four cells: both labels, the first alone, the second alone, neither (a, b, c, d). Its log odds
ratio, with half a film added to each cell, so that it is defined where one is empty (Haldane, Annals of Human Genetics 20,
1956; Anscombe, Biometrika 43, 1956), is

    log [(a + 1/2) (d + 1/2)] / [(b + 1/2) (c + 1/2)]

0: the labels are named independently. How far the answers' lies above the truth's says what the model adds of its own; the
training table's says where it may have it from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from vlmalign.evaluation.bootstrap import Interval, check_settings, percentile_interval, resample_weights
from vlmalign.shapes import Bool, Float


class LabelTable(NamedTuple):
    """Which labels films have, or were answered to have."""

    named: Bool[np.ndarray, "film label"]
    patients: Sequence[str]  #: of each film


class PairOdds(NamedTuple):
    """One pair. Odds ratios are natural logarithms."""

    first: int  #: its labels, by their place
    second: int
    answers: Interval
    truth: Interval  #: of the same films
    training: Interval
    from_truth: Interval  #: answers - truth, on the same resamples
    from_training: Interval  #: answers - training, each resampled by itself
    fewest: int  #: films that have the rarer of the two labels, in the table that has the fewest of them


def pair_odds(
    answers: LabelTable,
    truth: Bool[np.ndarray, "film label"],
    training: LabelTable,
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> list[PairOdds]:
    """The odds of every pair of labels, with percentile intervals at `level` by patients; pairs in the order of the labels.

    Raises ValueError for settings out of range, and where a table has no film or another number of patients than films.
    """
    check_settings(draws, level)
    own, own_drawn = _log_odds(answers.named, answers.patients, draws, seed)
    real, real_drawn = _log_odds(truth, answers.patients, draws, seed)
    taught, taught_drawn = _log_odds(training.named, training.patients, draws, seed + 1)
    n, patients = len(answers.named), len(set(answers.patients))
    rarest = np.min([table.sum(axis=0) for table in (answers.named, truth, training.named)], axis=0)

    def interval(value: float, drawn: np.ndarray, *, n: int = n, patients: int = patients) -> Interval:
        return percentile_interval(value, drawn, level, n=n, patients=patients)

    trained = {"n": len(training.named), "patients": len(set(training.patients))}
    return [
        PairOdds(
            first,
            second,
            interval(own[pair], own_drawn[:, pair]),
            interval(real[pair], real_drawn[:, pair]),
            interval(taught[pair], taught_drawn[:, pair], **trained),
            interval(own[pair] - real[pair], own_drawn[:, pair] - real_drawn[:, pair]),
            interval(own[pair] - taught[pair], own_drawn[:, pair] - taught_drawn[:, pair]),
            int(min(rarest[first], rarest[second])),
        )
        for pair, (first, second) in enumerate(combinations(range(truth.shape[1]), 2))
    ]


def log_odds_ratio(
    both: Float[np.ndarray, "*draw pair"],
    first: Float[np.ndarray, "*draw pair"],
    second: Float[np.ndarray, "*draw pair"],
    films: Float[np.ndarray, "*draw #pair"],
) -> Float[np.ndarray, "*draw pair"]:
    """From the films that have both labels, the first (with or without the second), the second, and all films."""
    alone, other = first - both, second - both
    neither = films - first - other
    return np.log((both + 0.5) * (neither + 0.5) / ((alone + 0.5) * (other + 0.5)))


def _log_odds(
    named: Bool[np.ndarray, "film label"], patients: Sequence[str], draws: int, seed: int
) -> tuple[Float[np.ndarray, "pair"], Float[np.ndarray, "draw pair"]]:
    """Of the films as they are, and in each draw."""
    if len(named) == 0 or len(patients) != len(named):
        raise ValueError(
            f"expected one patient per film and at least one film, found {len(patients)} for {len(named)} films; pass the "
            "patient column of the same rows"
        )
    names, owner = np.unique(np.asarray(patients), return_inverse=True)
    labels = named.shape[1]
    first, second = (np.array(each, int) for each in zip(*combinations(range(labels), 2), strict=True))
    columns = np.concatenate([named, named[:, first] & named[:, second], np.ones((len(named), 1), bool)], axis=1)
    counts = np.zeros((len(names), columns.shape[1]))
    np.add.at(counts, owner, columns)

    def odds(sums: np.ndarray) -> np.ndarray:
        single, pairs, films = sums[..., :labels], sums[..., labels:-1], sums[..., -1:]
        return log_odds_ratio(pairs, single[..., first], single[..., second], films)

    drawn = [odds(weights @ counts) for weights in resample_weights(len(names), draws=draws, seed=seed)]
    return odds(counts.sum(axis=0)), np.concatenate(drawn)
