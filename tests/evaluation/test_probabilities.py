"""AUROC, calibration and pass@k of several samples agree with scikit-learn, scipy and counts over all draws by hand."""

import json
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import mode
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_auc_score

from vlmalign.evaluation.auroc import bootstrap_auroc
from vlmalign.evaluation.bootstrap import resample_weights
from vlmalign.evaluation.calibration import bin_of, expected_calibration_error, reliability
from vlmalign.evaluation.samples import majority_vote, pass_at_k, score_samples

LABELS = ("a", "b", "c")


def random_case(seed, *, levels=17, films=60, patients=25, rare=0.2):
    """Probabilities of `levels` distinct values, as shares of samples are; the last label never occurs."""
    rng = np.random.default_rng(seed)
    truth = rng.random((films, 3)) < [0.4, rare, 0.0]
    probability = np.clip(np.round((0.3 * truth + 0.7 * rng.random((films, 3))) * (levels - 1)), 0, levels - 1)
    owner = [f"p{i:02d}" for i in [*range(patients), *rng.integers(patients, size=films - patients)]]
    return truth, probability / (levels - 1), owner


# ---------------------------------------------------------------- AUROC


@pytest.mark.parametrize("levels", [2, 17, 10_001])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_agrees_with_scikit_learn_with_ties_and_without(seed, levels):
    truth, probability, owner = random_case(seed, levels=levels)
    found = bootstrap_auroc(truth, probability, owner, draws=20)
    theirs = [roc_auc_score(truth[:, i], probability[:, i]) for i in range(2)]
    np.testing.assert_allclose([each.value for each in found.label[:2]], theirs, rtol=1e-12)
    assert (found.label[2].value, found.label[2].low, found.label[2].undefined) == (None, None, 20)
    assert found.macro.value == pytest.approx(np.mean(theirs), rel=1e-12)
    assert found.macro_labels == 2


def test_auroc_intervals_equal_a_plain_loop_over_copied_films():
    truth, probability, owner = random_case(0, rare=0.4)
    names = sorted(set(owner))
    [weights] = resample_weights(len(names), draws=100, seed=4)
    drawn = []
    for weight in weights:
        rows = [i for i, name in enumerate(owner) for _ in range(int(weight[names.index(name)]))]
        drawn.append([roc_auc_score(truth[rows, i], probability[rows, i]) for i in range(2)])
    found = bootstrap_auroc(truth, probability, owner, draws=100, seed=4)
    for each, own in zip([*found.label[:2], found.macro], [*np.transpose(drawn), np.mean(drawn, axis=1)], strict=True):
        np.testing.assert_allclose((each.low, each.high), np.percentile(own, [2.5, 97.5]), rtol=1e-12)
        assert each.undefined == 0
        assert (each.n, each.patients) == (60, 25)


def test_auroc_needs_a_patient_for_every_film():
    truth, probability, owner = random_case(0)
    with pytest.raises(ValueError, match="found 59 for 60 films"):
        bootstrap_auroc(truth, probability, owner[1:])


# ---------------------------------------------------------------- calibration


@pytest.mark.parametrize("levels", [11, 17, 10_001])
def test_bins_agree_with_scikit_learn(levels):
    truth, probability, owner = random_case(1, levels=levels)
    share, mean = calibration_curve(truth.ravel(), probability.ravel(), n_bins=10, strategy="uniform")
    found = reliability(truth, probability, owner, draws=50)
    np.testing.assert_allclose([each.share.value for each in found], share, rtol=1e-12)
    np.testing.assert_allclose([each.mean for each in found], mean, rtol=1e-12)
    assert sum(each.n for each in found) == truth.size
    gaps = [each.n / truth.size * abs(each.share.value - each.mean) for each in found]
    assert expected_calibration_error(truth, probability) == pytest.approx(sum(gaps), rel=1e-12)


def test_calibration_error_by_hand():
    truth = np.array([True, False, False, False, True])
    found = expected_calibration_error(truth, np.array([0.9, 0.9, 0.2, 0.2, 1.0]))
    assert found == pytest.approx((2 * (0.9 - 0.5) + 2 * 0.2 + 0) / 5)
    assert expected_calibration_error(truth, truth.astype(float)) == 0.0
    assert expected_calibration_error(truth, 1.0 - truth) == 1.0
    assert expected_calibration_error(truth[:0], np.zeros(0)) is None
    assert bin_of(np.array([0.0, 0.1, 0.1001, 1.0]), 10).tolist() == [0, 0, 1, 9]  # right ends belong to a bin
    with pytest.raises(ValueError, match="between 0 and 1"):
        bin_of(np.array([1.5]), 10)


def test_shares_of_calibrated_probabilities_lie_in_their_intervals():
    rng = np.random.default_rng(0)
    probability = rng.integers(0, 17, (400, 3)) / 16
    truth = rng.random((400, 3)) < probability
    found = reliability(truth, probability, [str(i) for i in range(400)], draws=300)
    inside = [each.share.low <= each.mean <= each.share.high for each in found]
    assert np.mean(inside) >= 0.8


# ---------------------------------------------------------------- several samples


def sample(film, number, predicted, *, truth=("a",), valid=True, unknown=(), patient=None):
    return {
        "id": film, "patient": patient or film, "sample": number, "truth": list(truth), "predicted": list(predicted),
        "valid": valid, "unknown": list(unknown),
    }  # fmt: skip


ROWS = [
    *(sample("1", i, said) for i, said in enumerate((["a"], ["a", "b"], ["a"], ["c"]))),
    *(sample("2", i, said, truth=[]) for i, said in enumerate(([], ["b"], ["b"], []))),
    sample("3", 0, ["a"]), *(sample("3", i, [], valid=False) for i in (1, 2, 3)),
]  # fmt: skip


def test_more_than_half_is_a_majority_and_a_tie_is_not():
    votes = majority_vote(ROWS)
    assert [(row["id"], row["predicted"], row["valid"]) for row in votes] == [
        ("1", ["a"], True), ("2", [], True), ("3", [], False),
    ]  # fmt: skip
    unknown = [sample("4", i, [], unknown=["flu", "flu"] if i else []) for i in range(3)]
    assert majority_vote(unknown)[0]["unknown"] == ["flu"]


def test_the_vote_is_scipys_mode_of_each_label():
    rng = np.random.default_rng(0)
    said = rng.random((20, 5, 3)) < 0.5  # an odd number of samples has no ties
    rows = [
        sample(str(film), k, [label for label, on in zip(LABELS, said[film, k], strict=True) if on])
        for film in range(20)
        for k in range(5)
    ]
    theirs = mode(said.astype(int), axis=1).mode.astype(bool)
    assert [[label in row["predicted"] for label in LABELS] for row in majority_vote(rows)] == theirs.tolist()


@pytest.mark.parametrize("samples", [1, 5, 8])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_samples(samples):
    for right in range(samples + 1):
        outcome = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            every = [any(chosen) for chosen in combinations(outcome, k)]
            assert pass_at_k(samples, right, k) == pytest.approx(np.mean(every), rel=1e-12)


def test_scores_of_samples_by_hand():
    found = score_samples(ROWS, LABELS, subsets={"all 3": LABELS, "one": ("a",)}, draws=50)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert (found["n"], found["fail_rate"]) == (4, 3 / 12)
    # right samples of the films: 2, 2 and 1 of 4
    assert [each["k"] for each in found["pass_at_k"]] == [1, 2, 4]
    expected = [(0.5 + 0.5 + 0.25) / 3, (5 / 6 + 5 / 6 + 0.5) / 3, 1.0]
    assert [each["value"] for each in found["pass_at_k"]] == pytest.approx(expected)
    block = found["blocks"]["all 3"]
    a, b, c = block["per_label"]
    assert (a["support"], a["auroc"]["value"]) == (2, 1.0)  # shares .75 and .25 above 0
    assert b["auroc"]["value"] is c["auroc"]["value"] is None  # no film has them
    assert block["macro_labels"] == 1
    # shares: a .75 (true), 0, .25 (true); b .25, .5, 0; c .25, 0, 0; bins (.7, .8], (.2, .3], (.4, .5] and [0, .1]
    assert a["ece"] == pytest.approx((0.25 + 0.75) / 3)
    assert block["ece"] == pytest.approx((0.25 + abs(1 - 0.75) + 0.5) / 9)
    assert sum(each["n"] for each in block["bins"]) == 9
    assert found["blocks"]["one"]["per_label"] == [a]


def test_films_need_equally_many_samples():
    with pytest.raises(ValueError, match="as many samples of each film, found films with 3, 4"):
        majority_vote(ROWS[:-1])


def test_names_that_are_no_labels_are_never_exactly_right():
    rows = [sample("1", 0, [], truth=[], unknown=["flu"]), sample("1", 1, [], truth=[])]
    assert [each["value"] for each in score_samples(rows, LABELS, draws=10)["pass_at_k"]] == [0.5, 1.0]
