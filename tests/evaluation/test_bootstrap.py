"""Intervals resample whole patients, equal a plain loop over copied films, and cover what they claim to cover."""

import numpy as np
import pytest

from vlmalign.evaluation.bootstrap import bootstrap_f1, holm, paired_difference, resample_weights
from vlmalign.evaluation.f1 import evaluate

TRUE_F1 = 2 * 0.21 / (2 * 0.21 + 0.07 + 0.09)


def films(rng, *, patients, per_patient, labels=1):
    """Truth and prediction; a patient's films are copies of one another. F1 in the population is TRUE_F1."""
    truth = rng.random((patients, labels)) < 0.3
    predicted = rng.random((patients, labels)) < np.where(truth, 0.7, 0.1)
    owner = [f"p{i:04d}" for i in range(patients) for _ in range(per_patient)]
    return truth.repeat(per_patient, axis=0), predicted.repeat(per_patient, axis=0), owner


def ragged(seed, labels=4):
    """30 films of 12 patients, patients with 1 to several films, one label rare."""
    rng = np.random.default_rng(seed)
    truth = rng.random((30, labels)) < [0.5, 0.3, 0.2, 0.05]
    predicted = rng.random((30, labels)) < np.where(truth, 0.7, 0.2)
    owner = [f"p{i:02d}" for i in [*range(12), *rng.integers(12, size=18)]]
    return truth, predicted, owner


def plain_loop(truth, systems, owner, *, draws, seed):
    """The definition: copy each drawn patient's films, score the copies with the point estimate's own function."""
    names = sorted(set(owner))
    [weights] = resample_weights(len(names), draws=draws, seed=seed)
    drawn = []
    for weight in weights:
        rows = [i for i, name in enumerate(owner) for _ in range(int(weight[names.index(name)]))]
        scores = []
        for predicted in systems:
            report = evaluate(truth[rows], predicted[rows], tuple("abcd"), valid=np.ones(len(rows), bool))
            scores.append([*(label.f1 for label in report.labels), report.micro, report.macro, report.macro_all])
        drawn.append(scores)
    return np.array(drawn, float)  # [draw, system, score], None -> NaN


def every(intervals):
    return [*intervals.label, intervals.micro, intervals.macro, intervals.macro_all]


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_plain_loop_over_copied_films(seed):
    truth, predicted, owner = ragged(seed)
    drawn = plain_loop(truth, [predicted], owner, draws=200, seed=seed)[:, 0]
    ours = every(bootstrap_f1(truth, predicted, owner, draws=200, seed=seed))
    np.testing.assert_allclose([i.low for i in ours], np.nanpercentile(drawn, 2.5, axis=0), rtol=0, atol=1e-12)
    np.testing.assert_allclose([i.high for i in ours], np.nanpercentile(drawn, 97.5, axis=0), rtol=0, atol=1e-12)
    assert [i.undefined for i in ours] == np.isnan(drawn).sum(axis=0).tolist()


def test_paired_difference_equals_a_plain_loop_and_is_second_minus_first():
    truth, first, owner = ragged(0)
    second = truth & first
    drawn = plain_loop(truth, [first, second], owner, draws=200, seed=5)
    difference = drawn[:, 1] - drawn[:, 0]
    ours = every(paired_difference(truth, first, second, owner, draws=200, seed=5))
    np.testing.assert_allclose([i.low for i in ours], np.nanpercentile(difference, 2.5, axis=0), rtol=0, atol=1e-12)
    assert [i.undefined for i in ours] == np.isnan(difference).sum(axis=0).tolist()
    micro = paired_difference(truth, first, second, owner, draws=200, seed=5).micro
    assert micro.value == pytest.approx(
        bootstrap_f1(truth, second, owner).micro.value - bootstrap_f1(truth, first, owner).micro.value
    )
    assert micro.low > 0  # second drops false alarms only


def test_a_system_does_not_differ_from_itself():
    truth, predicted, owner = ragged(1)
    for interval in every(paired_difference(truth, predicted, predicted, owner, draws=100)):
        assert (interval.value, interval.low, interval.high) == (0, 0, 0)


def test_pairing_narrows_the_interval_of_two_systems_that_fail_on_the_same_films():
    rng = np.random.default_rng(0)
    truth, first, owner = films(rng, patients=200, per_patient=1)
    second = first ^ (rng.random(first.shape) < 0.02)
    paired = paired_difference(truth, first, second, owner).micro
    alone = bootstrap_f1(truth, first, owner).micro
    assert paired.high - paired.low < 0.6 * (alone.high - alone.low)


def test_value_is_the_point_estimate_and_lies_in_its_interval():
    truth, predicted, owner = ragged(2)
    report = evaluate(truth, predicted, tuple("abcd"), valid=np.ones(30, bool))
    intervals = bootstrap_f1(truth, predicted, owner)
    assert [i.value for i in intervals.label] == [label.f1 for label in report.labels]
    assert (intervals.micro.value, intervals.macro.value, intervals.macro_all.value) == (
        report.micro,
        report.macro,
        report.macro_all,
    )
    for interval in every(intervals):
        assert interval.low <= interval.value <= interval.high
        assert (interval.n, interval.patients) == (30, 12)


def test_copies_of_a_film_add_no_information_when_they_share_a_patient():
    rng = np.random.default_rng(3)
    truth, predicted, owner = films(rng, patients=80, per_patient=9)
    once = bootstrap_f1(truth[::9], predicted[::9], owner[::9])
    clustered = bootstrap_f1(truth, predicted, owner)
    by_film = bootstrap_f1(truth, predicted, [str(i) for i in range(720)])
    assert every(clustered) == [interval._replace(n=720) for interval in every(once)]
    ratio = (clustered.micro.high - clustered.micro.low) / (by_film.micro.high - by_film.micro.low)
    assert 2.5 < ratio < 3.5  # sqrt(9): treating films as independent would claim a third of the width


@pytest.mark.full
def test_coverage_is_near_its_level_by_patient_and_far_below_by_film():
    rng = np.random.default_rng(4)
    by_patient = by_film = 0
    for _ in range(300):
        truth, predicted, owner = films(rng, patients=80, per_patient=4)
        interval = bootstrap_f1(truth, predicted, owner, draws=200).micro
        by_patient += interval.low <= TRUE_F1 <= interval.high
        interval = bootstrap_f1(truth, predicted, [str(i) for i in range(320)], draws=200).micro
        by_film += interval.low <= TRUE_F1 <= interval.high
    assert 0.90 <= by_patient / 300 <= 0.98
    assert by_film / 300 <= 0.75


def test_the_seed_decides_and_the_order_of_films_does_not():
    truth, predicted, owner = ragged(3)
    shuffled = np.random.default_rng(0).permutation(30)
    base = bootstrap_f1(truth, predicted, owner, seed=1)
    assert bootstrap_f1(truth, predicted, owner, seed=1) == base
    assert bootstrap_f1(truth[shuffled], predicted[shuffled], [owner[i] for i in shuffled], seed=1) == base
    assert bootstrap_f1(truth, predicted, owner, seed=2) != base


def test_blocks_of_draws_do_not_change_the_draws(monkeypatch):
    [whole] = resample_weights(7, draws=50, seed=0)
    monkeypatch.setattr("vlmalign.evaluation.bootstrap._BLOCK", 7 * 8)
    blocks = list(resample_weights(7, draws=50, seed=0))
    assert [len(block) for block in blocks] == [8, 8, 8, 8, 8, 8, 2]
    np.testing.assert_array_equal(np.concatenate(blocks), whole)
    assert (whole.sum(axis=1) == 7).all()


def test_undefined_draws_are_counted_and_left_out():
    truth = np.zeros((20, 2), bool)
    truth[0, 0] = True  # one film has label 0: absent from about (1 - 1/20)^20 = 36 % of draws; label 1: from all
    intervals = bootstrap_f1(truth, truth, [str(i) for i in range(20)])
    rare, never = intervals.label
    assert (rare.value, rare.low, rare.high) == (1, 1, 1)
    assert 310 < rare.undefined < 410
    assert (never.value, never.low, never.high, never.undefined) == (None, None, None, 1000)
    assert intervals.macro.undefined == intervals.micro.undefined == rare.undefined
    assert intervals.macro_all.undefined == 0
    assert (intervals.macro_all.value, intervals.macro_all.low) == (0.5, 0.0)


def test_one_patient_gives_a_value_and_no_interval():
    truth, predicted, _ = ragged(0)
    micro = bootstrap_f1(truth, predicted, ["p"] * 30).micro
    assert micro.value is not None
    assert (micro.low, micro.high, micro.patients) == (None, None, 1)


def test_a_wider_level_gives_a_wider_interval():
    truth, predicted, owner = ragged(0)
    narrow = bootstrap_f1(truth, predicted, owner, level=0.5).micro
    wide = bootstrap_f1(truth, predicted, owner, level=0.99).micro
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_thousand_draws_of_two_thousand_patients_take_no_second(cpu_seconds):
    truth, predicted, owner = films(np.random.default_rng(0), patients=2000, per_patient=1, labels=14)
    assert cpu_seconds(lambda: bootstrap_f1(truth, predicted, owner)) < 1  # about 0.1 s


def test_settings_out_of_range_are_refused():
    truth, predicted, owner = ragged(0)
    with pytest.raises(ValueError, match="draws must be >= 1, found 0"):
        bootstrap_f1(truth, predicted, owner, draws=0)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, found 95"):
        bootstrap_f1(truth, predicted, owner, level=95.0)
    with pytest.raises(ValueError, match="found 29 for 30 films"):
        bootstrap_f1(truth, predicted, owner[1:])
    with pytest.raises(ValueError, match="at least one film"):
        bootstrap_f1(truth[:0], predicted[:0], [])


def test_p_values_equal_a_plain_count_over_draws_and_agree_with_the_interval():
    truth, first, owner = ragged(0)
    second = truth & first
    drawn = plain_loop(truth, [first, second], owner, draws=199, seed=5)
    gaps = drawn[:, 1] - drawn[:, 0]
    ours = every(paired_difference(truth, first, second, owner, draws=199, seed=5))
    for difference, own in zip(ours, gaps.T, strict=True):
        known = own[~np.isnan(own)]
        tail = min((known <= 0).sum(), (known >= 0).sum())
        assert difference.p == min(1, 2 * (tail + 1) / (len(known) + 1))
        assert (difference.p < 0.05) == (difference.low > 0 or difference.high < 0)
    assert any(difference.p == 2 / 200 for difference in ours)
    assert all(each.p == 1 for each in every(paired_difference(truth, first, first, owner, draws=50)))
    assert paired_difference(truth, first, second, ["p"] * 30).micro.p is None


@pytest.mark.full
def test_a_p_value_below_five_per_cent_is_rare_where_nothing_differs():
    rng = np.random.default_rng(7)
    small = 0
    for _ in range(300):
        truth = rng.random((120, 1)) < 0.4
        first, second = (rng.random((120, 1)) < np.where(truth, 0.7, 0.2) for _ in range(2))
        small += paired_difference(truth, first, second, [str(i) for i in range(120)], draws=199).micro.p < 0.05
    assert 0.02 <= small / 300 <= 0.09


def test_holm_by_hand():
    # The worked example of R's p.adjust(c(.01, .02, .03, .04), "holm"), in another order, and caps at 1.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    rng = np.random.default_rng(0)
    for p in rng.random((50, 6)):
        adjusted = np.array(holm(list(p)))
        # Step-down by its definition: reject in order of p until one exceeds alpha / (number left).
        for alpha in (0.05, 0.2, 0.5):
            rejected, order = set(), np.argsort(p)
            for rank, place in enumerate(order):
                if p[place] > alpha / (6 - rank):
                    break
                rejected.add(place)
            assert rejected == set(np.flatnonzero(adjusted <= alpha))
