"""Odds of label pairs: by hand, against scipy and statistics written out, and what their intervals must show."""

import numpy as np
import pytest
from scipy.stats.contingency import odds_ratio

from vlmalign.evaluation.bootstrap import resample_weights
from vlmalign.evaluation.label_pairs import LabelTable, log_odds_ratio, pair_odds


def table(*counts: int) -> np.ndarray:
    """Films by cell: both labels, the first alone, the second alone, neither."""
    cells = ([True, True], [True, False], [False, True], [False, False])
    return np.array([cell for cell, count in zip(cells, counts, strict=True) for _ in range(count)])


def names(films: int) -> list[str]:
    return [f"P{number}" for number in range(films)]


def pair(answers: np.ndarray, truth: np.ndarray, training: np.ndarray, **options):
    (found,) = pair_odds(
        LabelTable(answers, names(len(answers))), truth, LabelTable(training, names(len(training))), **options
    )
    return found


def test_by_hand():
    """(7.5 x 9.5) / (2.5 x 4.5), and with an empty cell (5.5 x 3.5) / (0.5 x 2.5)."""
    found = pair(table(7, 2, 4, 9), table(5, 4, 6, 7), table(5, 0, 2, 3), draws=5)
    assert found.answers.value == pytest.approx(np.log(7.5 * 9.5 / (2.5 * 4.5)))
    assert found.training.value == pytest.approx(np.log(5.5 * 3.5 / (0.5 * 2.5)))
    assert found.from_training.value == pytest.approx(found.answers.value - found.training.value)
    assert found.from_truth.value == pytest.approx(found.answers.value - found.truth.value)
    assert found.fewest == 5
    assert (found.answers.n, found.training.n) == (22, 10)


def test_without_the_correction_it_would_be_the_sample_odds_ratio():
    a, b, c, d = 70, 20, 40, 90
    corrected = float(
        log_odds_ratio(np.array([a - 0.5]), np.array([a + b - 1.0]), np.array([a + c - 1.0]), np.array([218.0]))[0]
    )
    assert corrected == pytest.approx(np.log(odds_ratio([[a, b], [c, d]], kind="sample").statistic))


def test_every_pair_in_order_and_patients_whole():
    rng = np.random.default_rng(0)
    answers, truth, training = (rng.random((n, 4)) < 0.4 for n in (30, 30, 50))
    patients = [f"P{number}" for number in rng.integers(0, 12, 30)]
    found = pair_odds(LabelTable(answers, patients), truth, LabelTable(training, names(50)), draws=40, seed=3)
    assert [(each.first, each.second) for each in found] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    # The interval of one pair, films counted one by one.
    order = sorted(set(patients))
    drawn = []
    for weights in np.concatenate(list(resample_weights(len(order), draws=40, seed=3))):
        films = np.repeat(answers, [int(weights[order.index(patient)]) for patient in patients], axis=0)[:, [1, 3]]
        cells = [(films == cell).all(axis=1).sum() + 0.5 for cell in ([1, 1], [0, 0], [1, 0], [0, 1])]
        drawn.append(np.log(cells[0] * cells[1] / (cells[2] * cells[3])))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert (found[4].answers.low, found[4].answers.high) == (pytest.approx(low), pytest.approx(high))


def test_answers_that_copy_the_truth_differ_from_it_by_nothing_at_all():
    truth = table(7, 2, 4, 9)
    found = pair(truth, truth, table(1, 9, 9, 1), draws=30)
    assert (found.from_truth.value, found.from_truth.low, found.from_truth.high) == (0.0, 0.0, 0.0)
    assert found.from_training.low > 0


def test_a_table_without_films_is_refused():
    with pytest.raises(ValueError, match="at least one film, found 0 for 0 films"):
        pair(table(1, 1, 1, 1), table(1, 1, 1, 1), np.zeros((0, 2), bool))
