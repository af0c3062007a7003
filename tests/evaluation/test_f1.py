"""F1 agrees with counts worked by hand and with scikit-learn, and never hides an undefined score."""

import doctest

import numpy as np
import pytest
from sklearn.metrics import f1_score, precision_score, recall_score

from vlmalign.evaluation import f1
from vlmalign.evaluation.f1 import Counts, LabelScore, evaluate, f1_values, label_matrix

LABELS = ("a", "b", "c", "d")
#                 a  b  c  d     a: found, missed, invented;  b: all missed
TRUTH = np.array([[1, 1, 0, 0],  # c: no positive, two false alarms;  d: never there, never predicted
                  [1, 0, 0, 0],
                  [0, 0, 0, 0],
                  [1, 1, 0, 0],
                  [0, 0, 0, 0]], bool)  # fmt: skip
GUESS = np.array([[1, 0, 1, 0],
                  [1, 0, 0, 0],
                  [1, 0, 1, 0],
                  [0, 0, 0, 0],
                  [0, 0, 0, 0]], bool)  # fmt: skip
VALID = np.array([1, 1, 1, 0, 0], bool)


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(f1).failed == 0


def test_truth_table_worked_by_hand():
    report = evaluate(TRUTH, GUESS, LABELS, valid=VALID)
    assert report.labels == (
        LabelScore("a", support=3, tp=2, fp=1, fn=1, precision=2 / 3, recall=2 / 3, f1=2 / 3),
        LabelScore("b", support=2, tp=0, fp=0, fn=2, precision=None, recall=0.0, f1=0.0),
        LabelScore("c", support=0, tp=0, fp=2, fn=0, precision=0.0, recall=None, f1=0.0),
        LabelScore("d", support=0, tp=0, fp=0, fn=0, precision=None, recall=None, f1=None),
    )
    assert report.n == 5
    assert report.micro == 4 / (4 + 3 + 3)
    assert (report.macro, report.macro_labels) == ((2 / 3 + 0) / 2, 2)  # a and b: c and d have no support
    assert report.macro_all == (2 / 3 + 0 + 0 + 0) / 4
    assert report.fail_rate == 2 / 5
    assert report.exact_match == 1 / 5  # film 1; film 4 says nothing and is not valid, though the truth is empty


def test_exact_match_needs_a_valid_completion():
    nothing = np.zeros((2, 4), bool)
    assert evaluate(nothing, nothing, LABELS, valid=np.array([True, False])).exact_match == 0.5


def test_nothing_there_and_nothing_predicted_is_undefined_not_zero_or_one():
    nothing = np.zeros((3, 4), bool)
    report = evaluate(nothing, nothing, LABELS, valid=np.ones(3, bool))
    assert (report.micro, report.macro, report.macro_labels, report.macro_all) == (None, None, 0, 0.0)
    assert all(score.f1 is None for score in report.labels)


def test_false_alarms_on_absent_labels_cost_micro_but_not_macro():
    alarm = GUESS | np.array([0, 0, 0, 1], bool)
    quiet, loud = (evaluate(TRUTH, guess, LABELS, valid=np.ones(5, bool)) for guess in (GUESS, alarm))
    assert loud.macro == quiet.macro
    assert loud.micro < quiet.micro


@pytest.mark.parametrize("seed", range(20))
def test_agrees_with_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    prevalence = rng.choice([0.0, 0.02, 0.3, 0.9], size=(2, 9))
    truth, predicted = (rng.random((40, 9)) < share for share in prevalence)
    report = evaluate(truth, predicted, tuple(f"label {i}" for i in range(9)), valid=np.ones(40, bool))

    def by_label(field):
        return [np.nan if (value := getattr(score, field)) is None else value for score in report.labels]

    for field, reference in [("f1", f1_score), ("precision", precision_score), ("recall", recall_score)]:
        expected = reference(truth, predicted, average=None, zero_division=np.nan)
        np.testing.assert_allclose(by_label(field), expected, rtol=0, atol=1e-12)
    assert report.macro_all == pytest.approx(f1_score(truth, predicted, average="macro", zero_division=0))
    assert report.micro == pytest.approx(f1_score(truth, predicted, average="micro"))
    present = truth.any(axis=0)
    assert report.macro_labels == present.sum()
    assert report.macro == pytest.approx(f1_score(truth[:, present], predicted[:, present], average="macro"))
    assert report.exact_match == (truth == predicted).all(axis=1).mean()


def test_leading_dims_are_scored_one_by_one():
    counts = np.random.default_rng(0).integers(0, 3, size=(3, 7, 5))  # [tp fp fn, draw, label]
    together = f1_values(Counts(*counts))
    for draw in range(7):
        alone = f1_values(Counts(*counts[:, draw]))
        for field in together._fields:
            np.testing.assert_array_equal(getattr(together, field)[draw], getattr(alone, field))


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="at least one film, found none"):
        evaluate(TRUTH[:0], GUESS[:0], LABELS, valid=VALID[:0])
    with pytest.raises(ValueError, match="found 3 labels for 4 columns"):
        evaluate(TRUTH, GUESS, LABELS[:3], valid=VALID)
    with pytest.raises(ValueError, match=r"found \['flu'\] in row 1"):
        label_matrix([["a"], ["b", "flu"]], LABELS)
