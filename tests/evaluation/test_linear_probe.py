"""The linear probe: parity with scikit-learn's own cross-validation, patients kept whole, and its controls."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vlmalign.evaluation.linear_probe import chance, linear_probe, out_of_fold, shuffled


def material(groups: int, shift: float, films: int = 80):
    """Films of up to 40 patients; the first number tells the group by `shift` standard deviations."""
    rng = np.random.default_rng(0)
    owner = rng.integers(0, films // 2, films)
    group = owner % groups
    features = rng.standard_normal((films, 3))
    features[:, 0] += shift * group
    return features, group, [f"P{number}" for number in owner]


@pytest.mark.parametrize("groups", [2, 3])
def test_parity_with_scikit_learn(groups):
    features, group, patients = material(groups, 1.5)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    expected = cross_val_predict(
        model, features, group, groups=patients, method="predict_proba",
        cv=StratifiedGroupKFold(4, shuffle=True, random_state=5),
    )  # fmt: skip
    assert np.allclose(out_of_fold(features, group, patients, folds=4, seed=5), expected, atol=1e-9)
    found = linear_probe(features, group, patients, folds=4, draws=50, seed=5)
    assert found.accuracy.value == pytest.approx(accuracy_score(group, expected.argmax(axis=1)))
    truth = group[:, None] == np.arange(groups)
    assert found.auroc.value == pytest.approx(roc_auc_score(truth, expected, average="macro"))
    assert found.majority == pytest.approx(np.bincount(group).max() / len(group))
    assert found.auroc.low > 0.5


def test_what_only_patients_share_is_not_learnt():
    """Features that tell the patient, and nothing of the group beyond: films of one patient in two folds would give it away."""
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(40), 3)
    group, features = owner % 2, rng.standard_normal((40, 10))[owner]
    found = linear_probe(features, group, [f"P{number}" for number in owner], folds=5, draws=200)
    assert found.auroc.low < 0.5 < found.auroc.high


def test_shuffled_groups_keep_patients_whole_and_cannot_be_told():
    features, group, patients = material(2, 4.0)
    own = {}
    for patient, each in zip(patients, shuffled(group, patients, seed=2).tolist(), strict=True):
        assert own.setdefault(patient, each) == each
    assert sorted(own.values()) == sorted(dict(zip(patients, group.tolist(), strict=True)).values())
    assert linear_probe(features, group, patients, folds=4, draws=100).auroc.low > 0.95
    found = chance(features, group, patients, folds=4, shuffles=8, seed=2)
    single = [
        linear_probe(features, shuffled(group, patients, seed=2 + i), patients, folds=4, draws=1, seed=2)
        for i in range(8)
    ]
    assert found.auroc.value == pytest.approx(np.mean([each.auroc.value for each in single]))
    assert found.auroc.low < 0.5 < found.auroc.high
    assert found.auroc.high < 0.9


def test_too_few_patients_are_refused():
    features, group, patients = material(2, 1.0)
    with pytest.raises(
        ValueError, match="5 folds need two groups or more with at least 5 patients each, found 2 groups"
    ):
        out_of_fold(features[:8], group[:8], patients[:8], folds=5, seed=0)
    with pytest.raises(ValueError, match="found 1 groups"):
        out_of_fold(features, np.zeros(len(group), int), patients, folds=5, seed=0)
