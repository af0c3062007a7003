"""Intervals for F1 and for shares by resampling patients: films of one patient are not independent, so patients are drawn whole.

A draw takes as many patients as there are, with replacement. Scoring a draw needs only how often each patient was
drawn, because tp, fp and fn add up over patients:

    counts[draw] = sum_p weight[draw, p] counts[p]        one matrix product for all draws

Each draw is scored by the very rule of the point estimate (`f1_values`): `macro` is taken over the labels with support
*in the draw*. A draw in which a score is undefined is left out of that score's percentiles and counted.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.evaluation.f1 import Counts, F1Values, f1_values, none_if_nan, outcomes
from vlmalign.shapes import Bool, Float, Int

_BLOCK = 4_000_000  # weights held at once (32 MB): 1,000 draws of 65,000 patients would take 520 MB


class Interval(NamedTuple):
    """A score with its percentile interval.

    `value` is None where the score is undefined; `low` and `high` are None there too, where every draw is undefined,
    and with one patient (who says nothing about how patients differ).
    """

    value: float | None
    low: float | None
    high: float | None
    n: int  #: films
    patients: int
    undefined: int  #: draws left out, because the score was undefined in them


class Difference(NamedTuple):
    """A score of one system minus that of another, with its percentile interval and p-value; None as in `Interval`."""

    value: float | None
    low: float | None
    high: float | None
    n: int  #: films
    patients: int
    undefined: int  #: draws left out, because either score was undefined in them
    p: float | None  #: two-sided, of no difference; never below 2 / (draws + 1)


class F1Intervals(NamedTuple):
    """Every F1 with its interval; averages as in `F1Report`."""

    label: tuple[Interval, ...]
    micro: Interval
    macro: Interval
    macro_all: Interval


class F1Differences(NamedTuple):
    """Every difference of two systems' F1; averages as in `F1Report`."""

    label: tuple[Difference, ...]
    micro: Difference
    macro: Difference
    macro_all: Difference


def bootstrap_f1(
    truth: Bool[np.ndarray, "film label"],
    predicted: Bool[np.ndarray, "film label"],
    patients: Sequence[str],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> F1Intervals:
    """F1 per label, micro and macro, each with its patient-level percentile interval at `level`.

    `patients[i]` is the patient of film i. The result depends on the seed and the set of rows, not on their order.
    Raises ValueError for settings out of range and for a number of patients that is not the number of films.
    """
    counts = _patient_counts(truth, predicted, patients)
    point = _scores(counts.sum(axis=0))
    drawn = _drawn_scores([counts], draws, level, seed)[0]
    return _intervals(point, drawn, level, n=len(truth), patients=len(counts))


def bootstrap_ratio(
    hits: Sequence[float],
    of: Sequence[float],
    patients: Sequence[str],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """sum(hits) / sum(of) with its patient-level percentile interval: an accuracy, a mean, a share of constraints.

    One entry per answer; `of` is 0 where an answer does not count. `n` is the number of answers that do. The result
    depends on the seed and the set of rows, not on their order. Raises as `bootstrap_f1`.
    """
    if len(hits) == 0 or not len(hits) == len(of) == len(patients):
        raise ValueError(
            f"expected one patient per answer and at least one answer, found {len(patients)} for {len(hits)} answers"
            "; pass the patient column of the same rows"
        )
    check_settings(draws, level)
    names, owner = np.unique(np.asarray(patients), return_inverse=True)  # sorted: order of answers cannot matter
    sums = np.zeros((len(names), 2))
    np.add.at(sums, owner, np.stack([np.asarray(hits, float), np.asarray(of, float)], axis=1))
    drawn = np.concatenate([weights @ sums for weights in resample_weights(len(names), draws=draws, seed=seed)])
    with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 is undefined, as a draw or as a whole
        ratios = np.where(drawn[:, 1] > 0, drawn[:, 0] / drawn[:, 1], np.nan)
        total = sums.sum(axis=0)
        value = total[0] / total[1] if total[1] > 0 else float("nan")
    return percentile_interval(value, ratios, level, n=int(np.count_nonzero(of)), patients=len(names))


def paired_difference(
    truth: Bool[np.ndarray, "film label"],
    first: Bool[np.ndarray, "film label"],
    second: Bool[np.ndarray, "film label"],
    patients: Sequence[str],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> F1Differences:
    """F1 of `second` minus F1 of `first` on the same films, each with its interval and p-value.

    Both systems are scored on the same resamples, so what makes a film hard for both cancels: an interval that leaves
    out 0 speaks for a difference even where the two systems' own intervals overlap. A difference is undefined where
    either score is. With d* the difference in each of B draws (Davison & Hinkley, Bootstrap Methods, 1997, sec. 4.4)

        p = min(1, 2 (1 + min(#{d* <= 0}, #{d* >= 0})) / (1 + B))

    Raises as `bootstrap_f1`.
    """
    before = _patient_counts(truth, first, patients)
    after = _patient_counts(truth, second, patients)
    point = _scores(after.sum(axis=0)) - _scores(before.sum(axis=0))
    drawn_before, drawn_after = _drawn_scores([before, after], draws, level, seed)
    drawn = drawn_after - drawn_before
    found = _intervals(point, drawn, level, n=len(truth), patients=len(before))
    *label, micro, macro, macro_all = (
        Difference(*interval, None if interval.low is None else _p_value(gaps))
        for interval, gaps in zip([*found.label, *found[1:]], drawn.T, strict=True)
    )
    return F1Differences(tuple(label), micro, macro, macro_all)


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for the whole family by Holm's step-down method, in their order.

    With p_(1) <= ... <= p_(m): adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)). Rejecting those at or below
    alpha keeps the chance of any false rejection at or below alpha, however the tests depend on each other (Holm,
    Scandinavian Journal of Statistics 6, 1979).

    >>> holm([0.25, 0.125, 0.5])
    [0.5, 0.375, 0.5]
    """
    found = [0.0] * len(p)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        found[place] = largest
    return found


def _p_value(drawn: Float[np.ndarray, "draw"]) -> float:
    defined = drawn[~np.isnan(drawn)]
    side = min((defined <= 0).sum(), (defined >= 0).sum())
    return min(1.0, 2 * (1 + int(side)) / (1 + len(defined)))


def resample_weights(patients: int, *, draws: int, seed: int) -> Iterator[Float[np.ndarray, "draw patient"]]:
    """How often each patient is in each draw, in blocks of draws; every row sums to `patients`."""
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK // patients)
    for start in range(0, draws, block):
        rows = min(block, draws - start)
        drawn = rng.integers(patients, size=(rows, patients)) + patients * np.arange(rows)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=rows * patients)
        # float64 for the matrix product: numpy multiplies integers without BLAS; counts are exact below 2**53
        yield weights.reshape(rows, patients).astype(np.float64)


def _patient_counts(
    truth: Bool[np.ndarray, "film label"], predicted: Bool[np.ndarray, "film label"], patients: Sequence[str]
) -> Int[np.ndarray, "patient 3 label"]:
    if len(truth) == 0 or len(patients) != len(truth):
        raise ValueError(
            f"expected one patient per film and at least one film, found {len(patients)} for {len(truth)} films"
            "; pass the patient column of the same rows"
        )
    names, owner = np.unique(np.asarray(patients), return_inverse=True)  # sorted: order of films cannot matter
    counts = np.zeros((len(names), 3, truth.shape[1]), np.int64)
    np.add.at(counts, owner, outcomes(truth, predicted))
    return counts


def _scores(counts: Int[np.ndarray, "*draw 3 label"]) -> Float[np.ndarray, "*draw score"]:
    """The labels' F1, then micro, macro, macro_all, on one dim: all are resampled and subtracted alike."""
    values: F1Values = f1_values(Counts(*np.moveaxis(counts, -2, 0)))
    averages = np.stack([values.micro, values.macro, values.macro_all], axis=-1)
    return np.concatenate([values.label, averages], axis=-1)


def _drawn_scores(
    systems: list[Int[np.ndarray, "patient 3 label"]], draws: int, level: float, seed: int
) -> list[Float[np.ndarray, "draw score"]]:
    """Scores of each system in each draw, all systems on the same draws."""
    check_settings(draws, level)
    patients, _, labels = systems[0].shape
    blocks: list[list[np.ndarray]] = [[] for _ in systems]
    for weights in resample_weights(patients, draws=draws, seed=seed):
        for scores, counts in zip(blocks, systems, strict=True):
            summed = weights @ counts.reshape(patients, 3 * labels)  # [draw, 3 * label]
            scores.append(_scores(summed.astype(np.int64).reshape(-1, 3, labels)))
    return [np.concatenate(scores) for scores in blocks]


def _intervals(
    point: Float[np.ndarray, "score"],
    drawn: Float[np.ndarray, "draw score"],
    level: float,
    *,
    n: int,
    patients: int,
) -> F1Intervals:
    def interval(value: float, draws: Float[np.ndarray, "draw"]) -> Interval:
        return percentile_interval(value, draws, level, n=n, patients=patients)

    *label, micro, macro, macro_all = map(interval, point, drawn.T)
    return F1Intervals(tuple(label), micro, macro, macro_all)


def percentile_interval(
    value: float, drawn: Float[np.ndarray, "draw"], level: float, *, n: int, patients: int
) -> Interval:
    """A score with its interval from the scores of the draws, NaN where undefined."""
    defined = drawn[~np.isnan(drawn)]
    undefined = len(drawn) - len(defined)
    if np.isnan(value) or len(defined) == 0 or patients == 1:
        return Interval(none_if_nan(value), None, None, n, patients, undefined)
    low, high = np.percentile(defined, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(value), float(low), float(high), n, patients, undefined)


def check_settings(draws: int, level: float) -> None:
    """Raises ValueError for settings out of range."""
    if draws < 1:
        raise ValueError(f"draws must be >= 1, found {draws}; set e.g. 1000")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, found {level}; set e.g. 0.95")
