"""Preferences: shares, rates and Davidson's model beside closed forms, statsmodels, and simulated readers of known taste."""

import math

import numpy as np
import pytest
from scipy import stats
from simulated_votes import simulate

from vlmalign.review.analysis import davidson
from vlmalign.review.analysis.ballots import Ballot
from vlmalign.review.analysis.pairs import LOSS, TIED, WIN, Pairs, pairs
from vlmalign.review.analysis.preferences import arm_shares
from vlmalign.review.analysis.resampling import ratios
from vlmalign.review.analysis.sandwich import estimate
from vlmalign.review.plan import Assumed, latent
from vlmalign.review.two_way import two_way_mean

STYLE = {("c", arm): (99, 0) for arm in "xyz"}


@pytest.mark.parametrize(
    ("shown", "choice", "expected"),
    [
        ("xy", 0, [(0, 1, WIN)]),
        ("xy", 1, [(0, 1, LOSS)]),
        ("yx", 1, [(1, 0, LOSS)]),
        ("xy", "tie", [(0, 1, TIED)]),
        ("xy", "none", [(0, 1, TIED)]),
        ("zyx", 1, [(2, 1, LOSS), (1, 0, WIN)]),  # of z and x nothing is known
        ("xyz", "none", [(0, 1, TIED), (0, 2, TIED), (1, 2, TIED)]),
    ],
)
def test_a_ballot_as_comparisons(shown, choice, expected):
    found = pairs([Ballot("R1", "c", tuple(shown), choice)], "xyz", STYLE)
    assert list(zip(found.first, found.second, found.result, strict=True)) == expected


def test_style_is_counted_in_doublings():
    style = {("c", "x"): (199, 7), ("c", "y"): (49, 0)}
    found = pairs([Ballot("R1", "c", ("y", "x"), 0)], "xy", style)
    assert (found.length[0], found.formatting[0]) == (-2.0, -3.0)


def test_shares_and_rates_by_hand():
    said = [
        ("R1", "c", "xy", 0),
        ("R2", "c", "yx", 1),
        ("R1", "d", "xy", 1),
        ("R2", "d", "yx", "tie"),
        ("R1", "e", "xy", "none"),
    ]
    style = {(case, arm): (10, 0) for case in "cde" for arm in "xy"}
    ballots = [Ballot(reader, case, tuple(shown), choice) for reader, case, shown, choice in said]
    (x, y), (rate,) = arm_shares(ballots, pairs(ballots, "xy", style), "xy")
    assert (x.shown, x.preferred, x.ties, x.none) == (5, 2, 1, 1)
    assert (x.share.value, y.share.value) == pytest.approx((2 / 5, 1 / 5))
    assert (rate.wins, rate.ties, rate.losses) == (2, 2, 1)
    assert rate.rate.value == x.points.value == pytest.approx(3 / 5)
    assert rate.difference.value == pytest.approx(1 / 5)
    assert rate.rate.low <= rate.rate.value <= rate.rate.high


def test_two_way_resampling_is_as_wide_as_the_two_way_sandwich():
    """The pigeonhole bootstrap is somewhat wider (Owen 2007): within 15 % where both spreads are large."""
    chance = np.random.default_rng(5)
    readers, cases = 20, 30
    values = (
        chance.normal(0, 1, (readers, 1)) + chance.normal(0, 1, (1, cases)) + chance.normal(0, 1, (readers, cases))
    ) > 0.2
    where = [axis.ravel() for axis in np.indices(values.shape)]
    found = ratios(values.reshape(1, -1), np.ones((1, values.size)), *where)
    sandwich = two_way_mean(values.astype(float), np.ones_like(values))
    assert found.value[0] == pytest.approx(sandwich.mean)
    assert 0.9 < found.drawn.std() / sandwich.error < 1.15
    one_way = math.sqrt(values.mean() * (1 - values.mean()) / values.size)
    assert found.drawn.std() > 2 * one_way


def test_one_reader_gives_no_interval():
    found = ratios(np.ones((1, 3)), np.ones((1, 3)), np.zeros(3, int), np.arange(3)).interval(0)
    assert found == (1.0, None, None, 3)


def test_the_sandwich_of_a_mean_is_that_of_two_way():
    chance = np.random.default_rng(0)
    seen = chance.random((5, 9)) < 0.7
    values = chance.random((5, 9))
    reader, case = np.nonzero(seen)
    y = values[seen]
    found = estimate(["mean"], np.array([y.mean()]), np.array([[len(y)]]), (y - y.mean())[:, None], reader, case, 0.0)
    expected = two_way_mean(values, seen)
    assert found.effect({"mean": 1}).error == pytest.approx(float(expected.error))
    assert found.df == expected.df


def simulated(seed=0, tie=None, **options):
    options = {"readers": 12, "cases": 60, "side": 0.3, "length": 0.5} | options
    strengths = options.pop("strengths", {"x": 0.0, "y": 0.8, "z": -0.4})
    ballots, style = simulate(np.random.default_rng(seed), strengths, tie=tie, **options)
    return pairs(ballots, list(strengths), style)


def test_without_ties_it_is_the_logistic_regression_of_statsmodels_with_its_two_way_covariance():
    from statsmodels.discrete.discrete_model import Logit
    from statsmodels.stats.sandwich_covariance import cov_cluster

    compared = simulated()
    found = davidson.fit(compared, "xyz", style=["length"])
    x = davidson._differences(compared, 3, ["length"])
    reference = Logit(compared.result == WIN, x).fit(disp=0, tol=1e-12)
    assert found.names == ["arm y", "arm z", "shown first", "length"]
    np.testing.assert_allclose(found.values, reference.params, rtol=1e-6)
    assert found.loglikelihood == pytest.approx(reference.llf)
    both = compared.reader * 1000 + compared.case
    for part, group in ((found.by_reader, compared.reader), (found.by_case, compared.case), (found.both, both)):
        g = len(np.unique(group))
        expected = cov_cluster(reference, group, use_correction=False) * g / (g - 1)
        np.testing.assert_allclose(part, expected, rtol=1e-5)
    effect = found.effect({"arm y": 1})
    assert effect.p == pytest.approx(2 * stats.t.sf(abs(effect.value / effect.error), 11))


def test_with_ties_it_is_the_conditional_logit_of_statsmodels():
    from statsmodels.discrete.conditional_models import ConditionalLogit

    compared = simulated(tie=-0.5, readers=4, cases=30)
    found = davidson.fit(compared, "xyz")
    x = davidson._differences(compared, 3, [])
    features = np.stack([x / 2, np.zeros_like(x), -x / 2], axis=1)  # vote, result, parameter
    tie = np.broadcast_to([[0.0], [1.0], [0.0]], (len(x), 3, 1))
    features = np.concatenate([features, tie], axis=2).reshape(-1, x.shape[1] + 1)
    chosen = (np.arange(3) == compared.result[:, None]).ravel()
    reference = ConditionalLogit(chosen.astype(int), features, groups=np.repeat(np.arange(len(x)), 3)).fit(disp=0)
    np.testing.assert_allclose(found.values, reference.params, atol=1e-4)
    assert found.loglikelihood == pytest.approx(reference.llf, rel=1e-6)


def test_two_arms_have_a_closed_form():
    """Sides in balance: a = log(wins / losses), nu = ties / sqrt(wins * losses)."""
    result = np.repeat([WIN, TIED, LOSS], [30, 10, 15])
    first = np.concatenate([np.ones(55, int), np.zeros(55, int)])
    both = np.concatenate([result, LOSS - result])
    compared = Pairs(first, 1 - first, both, np.arange(110) % 5, np.arange(110) // 5, np.zeros(110), np.zeros(110))
    found = dict(zip((fit := davidson.fit(compared, "xy")).names, fit.values, strict=True))
    assert found["arm y"] == pytest.approx(math.log(2))
    assert found["shown first"] == pytest.approx(0, abs=1e-9)
    assert found["tie"] == pytest.approx(math.log(10 / math.sqrt(30 * 15)))


def test_simulated_readers_ranking_side_and_length_bias_are_recovered():
    """Every parameter of the model lies within three errors of the truth, and the best arm above the worst."""
    chance = np.random.default_rng(7)
    ballots, style = simulate(
        chance, {"x": 0.0, "y": 0.6, "z": -0.6}, readers=20, cases=150, side=0.3, length=0.5, tie=-1.0
    )
    found = davidson.fit(pairs(ballots, "xyz", style), "xyz", style=["length"])
    for name, truth in {"arm y": 0.6, "arm z": -0.6, "shown first": 0.3, "length": 0.5, "tie": -1.0}.items():
        effect = found.effect({name: 1})
        assert abs(effect.value - truth) < 3 * effect.error, name
        assert effect.error < 0.15
    assert found.effect({"arm y": 1, "arm z": -1}).value > 0.8


@pytest.mark.parametrize(
    ("first", "second", "result", "words"),
    [
        ([0, 1], [1, 0], [WIN, LOSS], "never won against, or never met"),
        ([0, 1, 2, 2], [1, 0, 0, 1], [WIN, WIN, LOSS, LOSS], r"x, y \| z|z \| x, y"),
        ([0, 0, 1], [1, 2, 2], [TIED] * 3, "every comparison is a tie"),
        ([0, 1, 0, 1] * 5, [1, 0, 1, 0] * 5, [WIN] * 20, "shown first parts wins from losses"),
    ],
)
def test_what_has_no_finite_estimate_is_refused(first, second, result, words):
    n = len(first)
    compared = Pairs(*map(np.array, (first, second, result)), np.arange(n) % 2, np.arange(n), np.zeros(n), np.zeros(n))
    with pytest.raises(ValueError, match=words):
        davidson.fit(compared, "xyz"[: max(*first, *second) + 1])


def test_style_without_variation_is_refused():
    compared = simulated(length=0.0)
    with pytest.raises(ValueError, match="formatting cannot be told from the arms"):
        davidson.fit(compared, "xyz", style=["formatting"])


@pytest.mark.full
@pytest.mark.parametrize(("readers", "cases"), [(15, 40), (5, 40)])
def test_intervals_cover_over_500_simulated_studies(readers, cases):
    """Latent normal taste with effects of readers and cases (plan.py); the log odds of a win and a loss are then known."""
    model = latent(Assumed(0.62, 0.3, 0.15, 0.05))
    truth = math.log(stats.norm.sf(model.tau - model.mu) / stats.norm.cdf(-model.tau - model.mu))
    chance = np.random.default_rng(11)
    reader, case = (axis.ravel() for axis in np.indices((readers, cases)))
    covered, widths = 0, []
    for _ in range(500):
        z = model.mu + chance.normal(0, math.sqrt(1 - model.case - model.reader), reader.size)
        z += (
            chance.normal(0, math.sqrt(model.reader), readers)[reader]
            + chance.normal(0, math.sqrt(model.case), cases)[case]
        )
        first = (reader + case + chance.integers(2, size=readers)[reader]) % 2
        points = np.where(z > model.tau, WIN, np.where(z < -model.tau, LOSS, TIED))  # of y
        result = np.where(first == 1, points, LOSS - points)
        compared = Pairs(first, 1 - first, result, reader, case, np.zeros(len(z)), np.zeros(len(z)))
        effect = davidson.fit(compared, "xy").effect({"arm y": 1})
        covered += effect.low <= truth <= effect.high
        widths.append(effect.high - effect.low)
    print(f"{readers} readers x {cases} cases: coverage {covered / 500:.3f}, mean width {np.mean(widths):.2f} log odds")
    assert covered / 500 >= 0.93
