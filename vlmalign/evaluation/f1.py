"""Multilabel F1 from truth and prediction matrices: per label, micro and two macro averages. Shares lie in [0, 1].

Conventions, needed because rare labels may be missing from a test set:

| truth has positives | any predicted | F1 of the label                | in `macro` | in `macro_all` |
|---------------------|---------------|--------------------------------|------------|----------------|
| yes                 | yes or no     | 2 tp / (2 tp + fp + fn)        | yes        | yes            |
| no                  | yes           | 0, as the formula gives        | no         | as 0           |
| no                  | no            | undefined: None, never 0 or 1  | no         | as 0           |

`macro` leaves out every label without a true positive film: on such a label the best system is undefined and one false
alarm makes it 0, so it says nothing about finding the label; its false alarms count in `micro`. `macro_all` averages
over all labels, undefined as 0 (scikit-learn's `zero_division=0`), as published tables do.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Bool, Float, Int


class Counts(NamedTuple):
    """True positives, false positives, false negatives; true negatives play no part in F1."""

    tp: Int[np.ndarray, "*draw label"]
    fp: Int[np.ndarray, "*draw label"]
    fn: Int[np.ndarray, "*draw label"]


class F1Values(NamedTuple):
    """F1 per label and averaged, for any number of leading dims; NaN where undefined."""

    label: Float[np.ndarray, "*draw label"]
    micro: Float[np.ndarray, "*draw"]  #: F1 of the counts summed over labels
    macro: Float[np.ndarray, "*draw"]  #: mean over the labels with support
    macro_all: Float[np.ndarray, "*draw"]  #: mean over all labels, undefined as 0


@dataclass(frozen=True)
class LabelScore:
    """One label's counts and scores; a score whose denominator is 0 is None."""

    label: str
    support: int  #: films that have the label: tp + fn
    tp: int
    fp: int
    fn: int
    precision: float | None  #: tp / (tp + fp)
    recall: float | None  #: tp / (tp + fn)
    f1: float | None


@dataclass(frozen=True)
class F1Report:
    """Scores of one system on one set of films."""

    n: int  #: films
    labels: tuple[LabelScore, ...]  #: in the order of the schema
    micro: float | None
    macro: float | None  #: over the labels with support
    macro_labels: int  #: how many labels `macro` was taken over
    macro_all: float  #: over all labels, undefined as 0
    exact_match: float  #: share of films with a valid completion that predicts exactly the true set
    fail_rate: float  #: share of films whose completion is not valid


def label_matrix(rows: Sequence[Iterable[str]], labels: tuple[str, ...]) -> Bool[np.ndarray, "film label"]:
    """Which label each film has: one row per film, one column per label. Raises ValueError for an unlisted label.

    >>> label_matrix([["Edema"], []], ("Fracture", "Edema")).tolist()
    [[False, True], [False, False]]
    """
    column = {label: i for i, label in enumerate(labels)}
    matrix = np.zeros((len(rows), len(labels)), bool)
    for i, row in enumerate(rows):
        names = list(row)
        if unlisted := sorted(set(names) - set(column)):
            raise ValueError(f"expected labels among {labels}, found {unlisted} in row {i}; map or drop them")
        matrix[i, [column[name] for name in names]] = True
    return matrix


def outcomes(
    truth: Bool[np.ndarray, "film label"], predicted: Bool[np.ndarray, "film label"]
) -> Int[np.ndarray, "film 3 label"]:
    """Each film's tp, fp and fn (in this order), 0 or 1."""
    assert truth.shape == predicted.shape, (truth.shape, predicted.shape)
    return np.stack([truth & predicted, ~truth & predicted, truth & ~predicted], axis=1).astype(np.int64)


def f1_values(counts: Counts) -> F1Values:
    """F1 = 2 tp / (2 tp + fp + fn) per label, micro and macro (conventions: top of this file); NaN = undefined."""
    tp, fp, fn = counts
    label = _ratio(2 * tp, 2 * tp + fp + fn)
    micro = _ratio(2 * tp.sum(-1), (2 * tp + fp + fn).sum(-1))
    supported = tp + fn > 0  # support > 0 makes the label's F1 defined
    macro = _ratio(np.where(supported, label, 0.0).sum(-1), supported.sum(-1))
    macro_all = np.asarray(np.nan_to_num(label, nan=0.0).mean(-1))
    return F1Values(label, micro, macro, macro_all)


def evaluate(
    truth: Bool[np.ndarray, "film label"],
    predicted: Bool[np.ndarray, "film label"],
    labels: tuple[str, ...],
    *,
    valid: Bool[np.ndarray, "film"],
    says: Bool[np.ndarray, "film"] | None = None,
) -> F1Report:
    """All scores of one system. A film whose completion is not valid has an empty row in `predicted`, and so has one
    that names nothing but what is no label. `says` is False of both (None: of the former alone).

    Both then cost recall, and never count as an exact match, not even where the true set is empty.
    Raises ValueError if there is no film or a name is missing for a column.
    """
    if len(truth) == 0:
        raise ValueError("expected at least one film, found none; check the predictions file")
    if len(labels) != truth.shape[1]:
        raise ValueError(
            f"expected one name per column, found {len(labels)} labels for {truth.shape[1]} columns; pass one schema"
        )
    says = valid if says is None else says
    counts = Counts(*outcomes(truth, predicted).sum(axis=0))
    values = f1_values(counts)
    precision = _ratio(counts.tp, counts.tp + counts.fp)
    recall = _ratio(counts.tp, counts.tp + counts.fn)
    scores = tuple(
        LabelScore(
            label=label,
            support=int(counts.tp[i] + counts.fn[i]),
            tp=int(counts.tp[i]),
            fp=int(counts.fp[i]),
            fn=int(counts.fn[i]),
            precision=none_if_nan(precision[i]),
            recall=none_if_nan(recall[i]),
            f1=none_if_nan(values.label[i]),
        )
        for i, label in enumerate(labels)
    )
    return F1Report(
        n=len(truth),
        labels=scores,
        micro=none_if_nan(values.micro),
        macro=none_if_nan(values.macro),
        macro_labels=sum(score.support > 0 for score in scores),
        macro_all=float(values.macro_all),
        exact_match=float((says & (truth == predicted).all(axis=1)).mean()),
        fail_rate=float((~valid).mean()),
    )


def jaccard(
    truth: Bool[np.ndarray, "film label"], predicted: Bool[np.ndarray, "film label"], says: Bool[np.ndarray, "film"]
) -> Float[np.ndarray, "film"]:
    """|T n P| / |T u P| of each film, 1 where both are empty; 0 where the answer says nothing (`says`).

    What the rewards of label lists pay. scikit-learn's `jaccard_score(average="samples", zero_division=1)` is its mean.
    """
    both, either = (truth & predicted).sum(axis=1), (truth | predicted).sum(axis=1)
    return np.where(says, np.where(either > 0, both / np.maximum(either, 1), 1.0), 0.0)


def none_if_nan(value: np.ndarray | float) -> float | None:
    """A number for a record: undefined is NaN in arrays (they must stay numeric) and None in records."""
    return None if np.isnan(value) else float(value)


def _ratio(numerator: np.ndarray | np.number, denominator: np.ndarray | np.number) -> np.ndarray:
    """numerator / denominator, NaN where the denominator is 0."""
    undefined = np.full(np.shape(denominator), np.nan)
    return np.divide(numerator, denominator, out=undefined, where=np.asarray(denominator > 0))
