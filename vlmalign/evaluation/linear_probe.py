"""Can a linear function of frozen features tell which group a film comes from? Out-of-fold, by patients.

Features are standardised and a logistic regression is fitted (scikit-learn's, L2 with C = 1) on all folds but one, which it
then predicts; a patient's films are all in one fold, and folds hold the groups in like shares as far as that allows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.evaluation.auroc import bootstrap_auroc
from vlmalign.evaluation.bootstrap import Interval, bootstrap_ratio
from vlmalign.shapes import Float, Int


class ProbeScore(NamedTuple):
    """How well groups are told apart, by patients' bootstrap of the out-of-fold predictions (the fits are not repeated)."""

    accuracy: Interval
    auroc: Interval  #: mean over groups of one against the rest; 0.5: not at all
    majority: float  #: accuracy of always naming the largest group


def linear_probe(
    features: Float[np.ndarray, "film number"],
    group: Int[np.ndarray, "film"],
    patients: Sequence[str],
    *,
    folds: int,
    draws: int = 1000,
    seed: int = 0,
) -> ProbeScore:
    """Scores of telling `group` (0, 1, ...) from `features`.

    Raises:
        ValueError: as `out_of_fold`.
    """
    probability = out_of_fold(features, group, patients, folds=folds, seed=seed)
    truth = group[:, None] == np.arange(probability.shape[1])
    right = probability.argmax(axis=1) == group
    accuracy = bootstrap_ratio(right.tolist(), [1] * len(right), patients, draws=draws, seed=seed)
    auroc = bootstrap_auroc(truth, probability, patients, draws=draws, seed=seed).macro
    return ProbeScore(accuracy, auroc, float(truth.mean(axis=0).max()))


def out_of_fold(
    features: Float[np.ndarray, "film number"],
    group: Int[np.ndarray, "film"],
    patients: Sequence[str],
    *,
    folds: int,
    seed: int,
) -> Float[np.ndarray, "film group"]:
    """The probability of each group for each film, by a fit that has not seen the film's patient.

    Raises:
        ValueError: for fewer than two groups, or a group with fewer patients than folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    names = np.asarray(patients)
    count = int(group.max()) + 1
    fewest = min(len(set(names[group == each])) for each in range(count))
    if count < 2 or fewest < folds:
        raise ValueError(
            f"{folds} folds need two groups or more with at least {folds} patients each, found {count} groups, the smallest "
            f"with {fewest} patients; draw larger sets, or lower folds"
        )
    found = np.zeros((len(group), count))
    splits = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for fitted, held in splits.split(features, group, names):
        if len(set(group[fitted])) < count:
            raise ValueError(f"a fold of {folds} leaves a group without films to fit; draw larger sets, or raise folds")
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        found[held] = model.fit(features[fitted], group[fitted]).predict_proba(features[held])
    return found


def chance(
    features: Float[np.ndarray, "film number"],
    group: Int[np.ndarray, "film"],
    patients: Sequence[str],
    *,
    folds: int,
    shuffles: int,
    seed: int = 0,
) -> ProbeScore:
    """What `linear_probe` finds where there is nothing: the mean over `shuffles` of the groups (see `shuffled`), and as low
    and high the 2.5th and the 97.5th percentile of them.

    Raises:
        ValueError: as `out_of_fold`.
    """
    found = [
        linear_probe(features, shuffled(group, patients, seed=seed + i), patients, folds=folds, draws=1, seed=seed)
        for i in range(shuffles)
    ]

    def spread(scores: Sequence[Interval]) -> Interval:
        values = [score.value for score in scores]
        low, high = np.percentile(values, [2.5, 97.5])
        return scores[0]._replace(value=float(np.mean(values)), low=float(low), high=float(high))

    accuracy, auroc = spread([each.accuracy for each in found]), spread([each.auroc for each in found])
    return ProbeScore(accuracy, auroc, float(np.mean([each.majority for each in found])))


def shuffled(group: Int[np.ndarray, "film"], patients: Sequence[str], *, seed: int) -> Int[np.ndarray, "film"]:
    """The groups dealt out anew among patients, all films of a patient together."""
    _, first, owner = np.unique(np.asarray(patients), return_index=True, return_inverse=True)
    return np.random.default_rng(seed).permutation(group[first])[owner]
