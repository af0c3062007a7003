"""Records as numbers, and what a classifier on them makes of a decision: the ceiling of a model that reads the same fields.

Numbers and flags are as they are, codes are categories, lists and texts are left out; what is missing stays missing, since
gradient-boosted trees take it as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.data.records.fields import CodeField, FlagField, NumberField
from vlmalign.data.records.records import Records

#: of the classifier, which takes at most 255 categories
TREES, MOST_CATEGORIES = 100, 255


class Features(NamedTuple):
    """The fields that a summary tells, as far as they have numbers."""

    matrix: np.ndarray  #: float64 [records, fields], NaN where nothing is known
    categorical: np.ndarray  #: bool [fields]
    names: tuple[str, ...]


def features(records: Records, names: Sequence[str] | None = None) -> Features:
    """The matrix of these fields; None: of those that the summary tells.

    Raises:
        ValueError: where none of them has numbers.
    """
    columns: dict[str, np.ndarray] = {}
    categorical = []
    for name in records.told if names is None else names:
        field, values = records.fields[name], records.column(name)
        if isinstance(field, NumberField | FlagField):
            columns[name] = values.astype(float)
            categorical.append(False)
        elif isinstance(field, CodeField):
            known = sorted({value for value in values if value is not None})
            # Codes beyond the limit share a category: the trees would refuse them.
            place = {word: min(number, MOST_CATEGORIES - 1) for number, word in enumerate(known)}
            columns[name] = np.array([np.nan if value is None else place[value] for value in values])
            categorical.append(True)
    if not columns:
        raise ValueError("a classifier needs inputs of kind number, flag or code, found none that the summary tells")
    return Features(np.stack(list(columns.values()), axis=1), np.array(categorical), tuple(columns))


def probabilities(
    train: np.ndarray, classes: np.ndarray, test: np.ndarray, *, categorical: np.ndarray, of: int, seed: int
) -> np.ndarray:
    """What gradient-boosted trees that are fitted on `train` give each class of `test`: float64 [records, of].

    Args:
        train, test: float64 [records, fields], as `features` gives them.
        classes: int [records], of `train`, 0 to `of` - 1; one that it lacks gets 0 throughout.
        categorical: bool [fields].
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    found = np.zeros((len(test), of))
    present = np.unique(classes)
    if len(present) == 1:
        found[:, present[0]] = 1.0
        return found
    trees = HistGradientBoostingClassifier(
        max_iter=TREES, early_stopping=False, categorical_features=categorical, random_state=seed
    )
    found[:, present] = trees.fit(train, classes).predict_proba(test)
    return found


def out_of_fold(
    matrix: np.ndarray,
    classes: np.ndarray,
    patients: np.ndarray,
    *,
    categorical: np.ndarray,
    of: int,
    folds: int,
    seed: int,
) -> np.ndarray:
    """As `probabilities`, each record judged by trees that saw no record of its patient: float64 [records, of].

    Raises:
        ValueError: for fewer patients than folds.
    """
    owners, owner = np.unique(patients, return_inverse=True)
    if len(owners) < folds:
        raise ValueError(f"{folds} folds need as many patients, found {len(owners)}; lower folds")
    fold = (np.random.default_rng(seed).permutation(len(owners)) % folds)[owner]
    found = np.zeros((len(matrix), of))
    for each in range(folds):
        held = fold == each
        found[held] = probabilities(
            matrix[~held], classes[~held], matrix[held], categorical=categorical, of=of, seed=seed
        )
    return found
