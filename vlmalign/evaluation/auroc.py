"""Area under the ROC curve of label probabilities, with patient-level intervals.

The AUROC is the chance that a film with the label has a higher probability than one without, ties counting half (Mann and
Whitney). It is undefined where all films have the label or none has. With P_v and N_v the films with and without it
whose probability is the v-th smallest value:

    AUROC = sum_v P_v (sum_{u < v} N_u + N_v / 2) / (P N)

P_v and N_v add up over patients, so a draw needs only how often each patient was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.evaluation.bootstrap import Interval, check_settings, percentile_interval, resample_weights
from vlmalign.shapes import Bool, Float


class Aurocs(NamedTuple):
    """The AUROC of every label, and their mean; None where undefined."""

    label: tuple[Interval, ...]
    macro: Interval  #: over the labels for which it is defined, in a draw those for which it is defined there
    macro_labels: int  #: how many these are on the films as they are


def bootstrap_auroc(
    truth: Bool[np.ndarray, "film label"],
    probability: Float[np.ndarray, "film label"],
    patients: Sequence[str],
    *,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Aurocs:
    """AUROC per label and their mean, each with its percentile interval at `level`, patients drawn whole.

    Raises ValueError for settings out of range and for a number of patients that is not the number of films.
    """
    if len(truth) == 0 or len(patients) != len(truth):
        raise ValueError(
            f"expected one patient per film and at least one film, found {len(patients)} for {len(truth)} films"
            "; pass the patient column of the same rows"
        )
    check_settings(draws, level)
    names, owner = np.unique(np.asarray(patients), return_inverse=True)  # sorted: the order of films cannot matter
    counts = [_counts(truth[:, i], probability[:, i], owner, len(names)) for i in range(truth.shape[1])]
    point = np.array([_auroc(*each.sum(axis=0)) for each in counts])
    drawn = np.concatenate(
        [
            np.stack([_auroc(weights @ each[:, 0], weights @ each[:, 1]) for each in counts], axis=1)
            for weights in resample_weights(len(names), draws=draws, seed=seed)
        ]
    )  # [draw, label]

    def interval(value: np.ndarray, scores: np.ndarray) -> Interval:
        return percentile_interval(float(value), scores, level, n=len(truth), patients=len(names))

    label = tuple(interval(np.asarray(value), scores) for value, scores in zip(point, drawn.T, strict=True))
    return Aurocs(label, interval(_mean(point), _mean(drawn)), int((~np.isnan(point)).sum()))


def _counts(truth: np.ndarray, probability: np.ndarray, owner: np.ndarray, patients: int) -> np.ndarray:
    """[patient, 2, value]: of each patient, the films with the label and those without, by the value's rank."""
    values, rank = np.unique(probability, return_inverse=True)
    counts = np.zeros((patients, 2, len(values)))
    np.add.at(counts, (owner, np.where(truth, 0, 1), rank), 1.0)
    return counts


def _auroc(positive: Float[np.ndarray, "*draw value"], negative: Float[np.ndarray, "*draw value"]) -> np.ndarray:
    below = negative.cumsum(axis=-1) - negative / 2
    pairs = positive.sum(axis=-1) * negative.sum(axis=-1)
    wins = (positive * below).sum(axis=-1)
    return np.divide(wins, pairs, out=np.full(np.shape(pairs), np.nan), where=np.asarray(pairs > 0))


def _mean(values: np.ndarray) -> np.ndarray:
    """Over the labels that are defined; NaN where none is."""
    known = ~np.isnan(values)
    count = known.sum(axis=-1)
    return np.divide(
        np.where(known, values, 0.0).sum(axis=-1),
        count,
        out=np.full(np.shape(count), np.nan),
        where=np.asarray(count > 0),
    )
