"""Each baseline is the best of its kind, by exhaustive search where that is what it claims, and all four differ."""

from itertools import product

import numpy as np
import pytest

from vlmalign.evaluation.baselines import BASELINES
from vlmalign.evaluation.f1 import Counts, f1_values, outcomes

#                  a  b  c     counts 7, 4, 1 of 8; most frequent set: {a} (3 films)
TRAIN = np.array([[1, 0, 0],
                  [1, 0, 0],
                  [1, 0, 0],
                  [1, 1, 0],
                  [1, 1, 0],
                  [1, 1, 1],
                  [1, 0, 0],
                  [0, 1, 0]], bool)  # fmt: skip


def scores(train, row):
    return f1_values(Counts(*outcomes(train, np.tile(row, (len(train), 1))).sum(axis=0)))


def every_set(labels):
    return np.array(list(product([False, True], repeat=labels)))


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_contract(name):
    predicted = BASELINES[name](TRAIN, 11, seed=3)
    assert (predicted.shape, predicted.dtype) == ((11, 3), bool)
    np.testing.assert_array_equal(BASELINES[name](TRAIN, 11, seed=3), predicted)
    assert BASELINES[name](TRAIN, 0, seed=0).shape == (0, 3)
    with pytest.raises(ValueError, match="at least one training film, found none"):
        BASELINES[name](TRAIN[:0], 11, seed=3)


def test_constant_baselines_worked_by_hand():
    rows = {name: BASELINES[name](TRAIN, 2, seed=0).tolist() for name in BASELINES if name != "label prior"}
    assert rows == {
        "most frequent set": [[True, False, False]] * 2,
        "all positive": [[True, True, True]] * 2,
        # micro-F1 of {a}: 14/20 = .700; {a, b}: 22/28 = .786; {a, b, c}: 24/36 = .667
        "best fixed set": [[True, True, False]] * 2,
    }


@pytest.mark.parametrize("seed", range(10))
def test_best_fixed_set_is_the_best_of_all_sets(seed):
    rng = np.random.default_rng(seed)
    train = rng.random((40, 6)) < rng.random(6) * 0.8
    found = BASELINES["best fixed set"](train, 1, seed=0)[0]
    assert scores(train, found).micro == np.nanmax([scores(train, row).micro for row in every_set(6)])


@pytest.mark.parametrize("seed", range(5))
def test_all_positive_has_the_best_macro_of_all_sets(seed):
    rng = np.random.default_rng(seed)
    train = rng.random((40, 6)) < rng.random(6)
    best = np.nanmax([scores(train, row).macro_all for row in every_set(6)])
    assert scores(train, np.ones(6, bool)).macro_all == best


@pytest.mark.parametrize("seed", range(5))
def test_most_frequent_set_has_the_best_exact_match_of_all_sets(seed):
    train = np.random.default_rng(seed).random((40, 4)) < 0.4
    found = BASELINES["most frequent set"](train, 1, seed=0)[0]
    matches = [(train == row).all(axis=1).sum() for row in every_set(4)]
    assert (train == found).all(axis=1).sum() == max(matches)


def test_ties_are_settled_as_documented():
    train = np.array([[1, 0], [0, 1]], bool)
    assert BASELINES["most frequent set"](train, 1, seed=0).tolist() == [[False, True]]
    # {a}: 2/4, {a, b}: 4/6
    assert BASELINES["best fixed set"](train, 1, seed=0).tolist() == [[True, True]]
    nothing = np.zeros((3, 2), bool)
    assert BASELINES["best fixed set"](nothing, 1, seed=0).tolist() == [[False, False]]


def test_label_prior_draws_each_label_at_its_training_rate_and_by_its_seed():
    prior = BASELINES["label prior"]
    predicted = prior(TRAIN, 20_000, seed=0)
    np.testing.assert_allclose(predicted.mean(axis=0), TRAIN.mean(axis=0), rtol=0, atol=0.015)  # 4 sigma
    together = (predicted[:, 0] & predicted[:, 1]).mean()
    assert together == pytest.approx(7 / 8 * 4 / 8, abs=0.015)  # on its own: not the 3/8 of the training films
    assert (prior(TRAIN, 100, seed=1) != prior(TRAIN, 100, seed=2)).any()
    sure = np.array([[1, 0], [1, 0]], bool)
    assert (prior(sure, 500, seed=0) == sure[0]).all()  # rates 0 and 1 are exact
