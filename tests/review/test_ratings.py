"""Ratings and agreement beside statsmodels, scipy, and published values."""

import math

import krippendorff
import numpy as np
import pytest
from scipy import stats

from vlmalign.review.analysis.agreement import alpha, consistency, icc, kappa, pairwise_kappa
from vlmalign.review.analysis.averages import holm, paired_tests, preference_differences, rating_differences
from vlmalign.review.analysis.ballots import Rating
from vlmalign.review.analysis.ordinal import fit_ordinal
from vlmalign.review.analysis.pairs import LOSS, TIED, WIN, Pairs


def rated(seed=0, *, readers=10, cases=40, effect=0.8, spread=0.7):
    """Ratings of two arms by the proportional odds model, with readers of different mildness."""
    chance = np.random.default_rng(seed)
    mild = chance.normal(0, spread, readers)
    found = []
    for r in range(readers):
        for c in range(cases):
            swap = chance.random() < 0.5
            for side, arm in enumerate("yx" if swap else "xy"):
                latent = effect * (arm == "y") + mild[r] + chance.logistic()
                level = int(np.digitize(latent, [-2, -0.5, 0.5, 2]))
                found.append(Rating(f"R{r}", f"c{c}", arm, side, {"clarity": level, "two": int(latent > 0)}))
    return found


def test_two_levels_are_a_logistic_regression():
    from statsmodels.discrete.discrete_model import Logit

    ratings = rated()
    found = fit_ordinal(ratings, "two", "xy")
    x = np.array([[rating.arm == "y", rating.side == 0, 1.0] for rating in ratings], dtype=float)
    reference = Logit(np.array([rating.levels["two"] for rating in ratings]), x).fit(disp=0)
    assert found.names == ["arm y", "shown first", "threshold 1"]
    np.testing.assert_allclose(found.values, reference.params * [1, 1, -1], atol=1e-4)
    assert found.loglikelihood == pytest.approx(reference.llf)


def test_an_ordinal_effect_is_recovered_with_the_errors_of_statsmodels_sandwich():
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    ratings = rated(seed=3)
    found = fit_ordinal(ratings, "clarity", "xy")
    effect = found.effect({"arm y": 1})
    assert abs(effect.value - 0.8) < 3 * effect.error
    assert (found.readers, found.cases, found.df) == (10, 40, 9)
    x = np.array([[rating.arm == "y", rating.side == 0] for rating in ratings], dtype=float)
    readers = np.array([int(rating.reader[1:]) for rating in ratings])
    reference = OrderedModel(np.array([rating.levels["clarity"] for rating in ratings]), x, distr="logit").fit(
        start_params=found.values, method="bfgs", disp=0, gtol=1e-9,
        cov_type="cluster", cov_kwds={"groups": readers, "use_correction": False},
    )  # fmt: skip
    np.testing.assert_allclose(found.values, reference.params, atol=2e-3)
    expected = np.sqrt(np.diag(reference.cov_params())[:2] * 10 / 9)
    np.testing.assert_allclose(np.sqrt(np.diag(found.by_reader)[:2]), expected, rtol=1e-2)


@pytest.mark.parametrize(
    ("levels", "words"),
    [
        ({"x": 1, "y": 1}, "every rating is the same"),
        ({"x": 0, "y": 1}, "no finite estimate"),
        ({"x": 1}, "no rating of y"),
    ],
)
def test_ratings_without_a_finite_estimate_are_refused(levels, words):
    ratings = [
        Rating(f"R{r}", f"c{c}", arm, (r + c + (arm == "y")) % 2, {"k": level})
        for r in range(3)
        for c in range(6)
        for arm, level in levels.items()
    ]
    with pytest.raises(ValueError, match=words):
        fit_ordinal(ratings, "k", "xy")


def test_tests_take_averages_and_never_votes():
    """The same votes given ten times over change no p-value."""
    chance = np.random.default_rng(2)
    reader, case = (axis.ravel() for axis in np.indices((6, 20)))
    first = chance.integers(2, size=120)
    result = chance.choice([WIN, TIED, LOSS], 120)
    compared = Pairs(first, 1 - first, result, reader, case, np.zeros(120), np.zeros(120))
    tenfold = Pairs(*(np.tile(column, 10) for column in compared))
    for unit, n in (("cases", 20), ("readers", 6)):
        values = preference_differences(compared, 0, 1, unit)
        found = paired_tests(values, "preference", "x", "y", unit)
        assert found == paired_tests(preference_differences(tenfold, 0, 1, unit), "preference", "x", "y", unit)
        points = np.where(first == 0, 1 - result / 2, result / 2) - 0.5
        groups = {"cases": case, "readers": reader}[unit]
        by_hand = np.array([points[groups == i].mean() for i in range(n)])
        assert found.n == n
        assert found.wilcoxon == pytest.approx(stats.wilcoxon(by_hand, zero_method="pratt").pvalue)
        assert found.sign == stats.binomtest(int((by_hand > 0).sum()), int((by_hand != 0).sum())).pvalue


def test_ratings_are_compared_on_the_page_they_share():
    ratings = [
        Rating("R1", "c1", "x", 0, {"k": 4}), Rating("R1", "c1", "y", 1, {"k": 1}),
        Rating("R2", "c1", "x", 1, {"k": 2}), Rating("R2", "c1", "y", 0, {"k": 1}),
        Rating("R1", "c2", "x", 0, {"k": 0}),
    ]  # fmt: skip
    assert rating_differences(ratings, "k", "x", "y", "cases").tolist() == [2.0]
    assert rating_differences(ratings, "k", "x", "y", "readers").tolist() == [3.0, 1.0]
    none = paired_tests(np.zeros(3), "k", "x", "y", "cases")
    assert (none.wilcoxon, none.sign) == (None, None)


def test_holm_leaves_undefined_tests_out():
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([None]) == [None]


def table(rows):
    """Units by readers, None where a reader did not judge, as the module takes it."""
    return {
        (f"c{i}", "x"): {f"R{j}": value for j, value in enumerate(row) if value is not None}
        for i, row in enumerate(rows)
    }


def test_alpha_is_that_of_the_package_with_an_interval_over_cases():
    chance = np.random.default_rng(4)
    truth = chance.integers(0, 4, 60)
    rows = np.clip(truth[:, None] + chance.integers(-1, 2, (60, 5)), 0, 3).astype(float)
    rows[chance.random(rows.shape) < 0.3] = np.nan
    said = table([[None if np.isnan(value) else int(value) for value in row] for row in rows])
    for level in ("nominal", "ordinal"):
        found = alpha(said, 4, level, draws=200)
        assert found.value == pytest.approx(
            krippendorff.alpha(rows.T, level_of_measurement=level, value_domain=range(4))
        )
        assert found.low < found.value < found.high
    assert alpha(table([[1, 1], [1, 1]]), 3, "nominal").value is None
    assert alpha(table([[1, None]]), 3, "nominal") == (None, None, None, 0)


def test_icc_of_shrout_and_fleiss():
    """Their table 2: 6 targets, 4 judges; ICC(1,1) = .17."""
    rows = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
    assert icc(table(rows)) == pytest.approx(0.1657, abs=5e-5)
    assert icc(table([[1, 2]])) is None
    # Unequal groups: single readings say nothing and change nothing.
    assert icc(table([*rows, [3, None, None, None]])) == pytest.approx(0.1657, abs=5e-5)


def test_kappa_by_hand():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: observed .7, expected .5, kappa .4."""
    given = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    assert kappa(given, 2) == pytest.approx(0.4)
    assert kappa([(1, 1)] * 3, 2) is None
    found = pairwise_kappa({(f"c{i}", "x"): {"R1": a, "R2": b, "R3": a} for i, (a, b) in enumerate(given)}, 2)
    assert (found.pairs, found.high) == (3, 1.0)
    assert found.low == pytest.approx(0.4)
    assert found.mean == pytest.approx((0.4 + 0.4 + 1) / 3)


def test_consistency_of_each_reader_and_of_all():
    one, other, everyone = consistency([("R2", 0, 0), ("R1", 0, 1), ("R1", 1, 1), ("R2", 2, 2)], 3)
    assert (one.reader, one.repeats, one.same) == ("R1", 2, 1)
    assert (other.reader, other.repeats, other.same, other.kappa) == ("R2", 2, 2, 1.0)
    assert (everyone.reader, everyone.repeats, everyone.same) == ("all", 4, 3)
    assert not math.isnan(everyone.kappa)
    assert consistency([], 3) == []


def test_one_arm_on_one_side_has_nothing_to_compare():
    ratings = [Rating(f"R{r}", f"c{c}", "x", 0, {"k": (r + c) % 3}) for r in range(3) for c in range(4)]
    with pytest.raises(ValueError, match="one arm on one side"):
        fit_ordinal(ratings, "k", "x")
