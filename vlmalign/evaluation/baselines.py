"""Four predictors that never look at a film: what a trained model must beat.

Each is fitted on the training films' labels and predicts `n` test films. F1 is generous to them (predicting a label
with prevalence p everywhere already gives F1 = 2p / (1 + p)), so a table without them flatters every model.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from vlmalign.shapes import Bool


def most_frequent_set(train: Bool[np.ndarray, "film label"], n: int, *, seed: int) -> Bool[np.ndarray, "n label"]:
    """The label set that most training films have, on every film.

    Maximises the exact-match share on training among all constant predictions. Of equally frequent sets the first is
    taken when rows are sorted with absent before present, in the order of the schema.
    """
    del seed
    _check(train)
    sets, films = np.unique(train, axis=0, return_counts=True)
    return _repeat(sets[films.argmax()], n)


def label_prior(train: Bool[np.ndarray, "film label"], n: int, *, seed: int) -> Bool[np.ndarray, "n label"]:
    """Each label drawn on its own, on each film, with the share of training films that have it.

    Its expected F1 on a label is near that label's prevalence: what guessing at the right rate earns.
    """
    _check(train)
    return np.random.default_rng(seed).random((n, train.shape[1])) < train.mean(axis=0)


def all_positive(train: Bool[np.ndarray, "film label"], n: int, *, seed: int) -> Bool[np.ndarray, "n label"]:
    """Every label on every film. Recall 1; no constant prediction has a higher macro-F1."""
    del seed
    _check(train)
    return np.ones((n, train.shape[1]), bool)


def best_fixed_set(train: Bool[np.ndarray, "film label"], n: int, *, seed: int) -> Bool[np.ndarray, "n label"]:
    """The one label set with the highest micro-F1 on training, on every film.

    Criterion micro, not macro: a fixed set gives a label F1 = 2p / (1 + p) if it is in the set and 0 if not, so
    macro-F1 would always choose every label, which is `all_positive`. With N films, c_l of them having label l:

        micro-F1(S) = 2 sum_{l in S} c_l / (N |S| + sum_l c_l)

    For a given size of S the best choice is the most frequent labels, so trying each prefix of the labels sorted by
    frequency is an exact search over all sets. Ties go to the smaller set; equally frequent labels enter together;
    without any positive in training the set is empty.
    """
    del seed
    _check(train)
    films = train.sum(axis=0)  # [label]
    order = np.argsort(-films)
    hits = np.concatenate([[0], films[order].cumsum()])  # [label + 1], for sets of size 0, 1, ..., label
    # at least 1 below: without any positive the empty set has 0 / 0
    f1 = 2 * hits / np.maximum(len(train) * np.arange(len(hits)) + films.sum(), 1)
    chosen = np.zeros(train.shape[1], bool)
    chosen[order[: f1.argmax()]] = True
    return _repeat(chosen, n)


Baseline = Callable[..., np.ndarray]  #: (train [film, label], n, *, seed) -> predicted [n, label]

BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "most frequent set": most_frequent_set,
        "label prior": label_prior,
        "all positive": all_positive,
        "best fixed set": best_fixed_set,
    }
)


def _repeat(row: Bool[np.ndarray, "label"], n: int) -> Bool[np.ndarray, "n label"]:
    return np.tile(row, (n, 1))


def _check(train: Bool[np.ndarray, "film label"]) -> None:
    if len(train) == 0:
        raise ValueError("expected at least one training film, found none; pass the training set's label matrix")
