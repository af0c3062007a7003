"""Advantages from rewards, as tables worked by hand; dynamic sampling and the overlong penalty.

Equality with TRL's own advantages is in `test_grpo_trl.py`.
"""

import numpy as np
import pytest
from tiny_checkpoints import assert_close

from vlmalign.objectives.advantages import (
    EPSILON,
    combined_advantages,
    group_advantages,
    leave_one_out_advantages,
)
from vlmalign.objectives.dynamic_sampling import Decision, decide, soft_overlong_penalty
from vlmalign.objectives.kl import kl_per_token, rewards_less_kl

NAN = np.nan

#: rewards, and A without scaling: r - mean of the known ones
TABLE = [
    ([1.0, 0.0, 0.0, 1.0], [0.5, -0.5, -0.5, 0.5], False),
    ([3.0, 0.0, 0.0, 0.0], [2.25, -0.75, -0.75, -0.75], False),
    ([1.0, NAN, 0.0, 0.0], [2 / 3, 0.0, -1 / 3, -1 / 3], False),  # one without a reward
    ([1.0, NAN, NAN, NAN], [0.0] * 4, True),  # one alone is its own mean
    ([NAN] * 4, [0.0] * 4, True),
    ([0.7, 0.7, NAN, 0.7], [0.0] * 4, True),
    ([np.inf, 1.0, 0.0, -np.inf], [0.0, 0.5, -0.5, 0.0], False),  # an infinite reward is no reward
]


@pytest.mark.parametrize(("rewards", "expected", "flat"), TABLE)
def test_table(rewards, expected, flat):
    found = group_advantages(np.array([rewards]))
    assert_close(found.value, [expected], 1e-7)
    assert found.flat.tolist() == [flat]
    assert found.value.dtype == np.float32


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
@pytest.mark.parametrize("size", [3, 6, 7, 8])
@pytest.mark.parametrize("reward", [0.7, 0.1, 1e-8, -3.3, 1e6])
def test_equal_rewards_give_exact_zeros(scale, size, reward):
    """A mean of eight 0.7 is not 0.7 in float32, nor is that of three 0.1 in float64; division by 1e-4 would show it."""
    other = np.arange(size, dtype=np.float64) ** 2
    found = group_advantages(np.array([[reward] * size, other]), scale=scale)
    assert (found.value[0] == 0.0).all()
    assert found.flat.tolist() == [True, False]
    assert np.count_nonzero(found.value[1]) >= size - 1
    narrow = group_advantages(np.array([[reward] * size], np.float32), scale=scale)
    assert (narrow.value == 0.0).all()


def test_group_scale_is_the_bessel_deviation_of_the_known():
    found = group_advantages(np.array([[1.0, 2.0, NAN, 4.0], [0.0, 0.0, 0.0, 1.0]]), scale="group").value
    for row, known in enumerate([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0, 1.0]]):
        known = np.array(known)
        expected = (known - known.mean()) / (known.std(ddof=1) + EPSILON)
        assert_close(found[row][found[row] != 0], expected, 1e-6)


def test_batch_scale_is_one_deviation_for_all():
    rewards = np.array([[1.0, 2.0, NAN], [0.0, 0.0, 0.0], [5.0, 5.0, 9.0]])
    found = group_advantages(rewards, scale="batch").value
    spread = np.nanstd(rewards, ddof=1) + EPSILON
    assert_close(found, group_advantages(rewards).value / spread, 1e-6)


def test_one_reward_in_the_whole_batch():
    found = group_advantages(np.array([[1.0, NAN]]), scale="batch")
    assert (found.value == 0).all()


@pytest.mark.parametrize(("ddof", "deviation"), [(1, np.sqrt(5 / 3)), (0, np.sqrt(5 / 4))])
def test_bessel_and_population_deviation(ddof, deviation):
    """Of 0, 1, 2, 3: the sum of squares about the mean is 5."""
    rewards = np.array([[0.0, 1.0, 2.0, 3.0]])
    expected = np.array([[-1.5, -0.5, 0.5, 1.5]]) / (deviation + EPSILON)
    for scale in ("group", "batch"):
        assert_close(group_advantages(rewards, scale=scale, ddof=ddof).value, expected, 1e-7)


@pytest.mark.parametrize(
    ("rewards", "expected", "flat"),
    [
        ([1.0, 0.0, 0.0, 1.0], [2 / 3, -2 / 3, -2 / 3, 2 / 3], False),
        ([1.0, NAN, 0.0, 0.0], [1.0, 0.0, -0.5, -0.5], False),
        ([1.0, NAN, NAN, 0.0], [1.0, 0.0, 0.0, -1.0], False),
        ([1.0, NAN, NAN, NAN], [0.0] * 4, True),
        ([0.7] * 4, [0.0] * 4, True),
    ],
)
def test_leave_one_out(rewards, expected, flat):
    found = leave_one_out_advantages(np.array([rewards]))
    assert_close(found.value, [expected], 1e-7)
    assert found.flat.tolist() == [flat]
    if flat:
        both = leave_one_out_advantages(np.array([rewards, [1.0, 0.0, 0.0, 0.0]]), normalise=True)
        assert (both.value[0] == 0).all()


#: [2 groups, 3 completions, 2 rewards]: the second reward is flat in the first group
TWO = np.array([[[1.0, 0.7], [0.0, 0.7], [0.0, 0.7]], [[0.0, 1.0], [1.0, 0.0], [NAN, NAN]]])


def test_rewards_summed_then_normalised():
    found = combined_advantages(TWO, np.array([2.0, 1.0]))
    assert_close(found.value, [[4 / 3, -2 / 3, -2 / 3], [-0.5, 0.5, 0.0]], 1e-6)
    assert found.flat.tolist() == [False, False]


def test_rewards_normalised_then_summed():
    """Each reward to unit deviation within its group, the weighted sum to unit deviation over the batch."""
    third, half = 1 / (np.sqrt(1 / 3) + EPSILON), 1 / (np.sqrt(1 / 2) + EPSILON)
    total = np.array([[2 / 3 * third * 2, -third / 3 * 2, -third / 3 * 2], [-0.5 * half, 0.5 * half, 0.0]])
    known = np.array([*total[0], *total[1, :2]])
    found = combined_advantages(TWO, np.array([2.0, 1.0]), aggregation="normalise_then_sum")
    assert_close(found.value, total / (known.std(ddof=1) + EPSILON), 1e-6)
    assert found.value[1, 2] == 0


@pytest.mark.parametrize("aggregation", ["sum_then_normalise", "normalise_then_sum"])
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_flat_groups_are_exact_zeros_in_sums_too(scale, aggregation):
    """0.1 + 0.2 and 0.3 are equal rewards, though not equal floats."""
    rewards = np.array(
        [[[0.1, 0.2], [0.3, 0.0], [0.2, 0.1]], [[0.7, 0.1], [0.7, 0.1], [0.7, 0.1]], [[1.0, 0], [0, 0], [0, 0]]]
    )
    found = combined_advantages(rewards, aggregation=aggregation, scale=scale)
    summed = aggregation == "sum_then_normalise"
    assert found.flat.tolist() == [summed, True, False]
    assert (found.value[found.flat] == 0).all()
    assert found.value[2].all()


def test_a_reward_of_weight_zero_makes_no_difference():
    found = combined_advantages(TWO, np.array([0.0, 1.0]), aggregation="normalise_then_sum")
    assert found.flat.tolist() == [True, False]


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: group_advantages(np.array([[1.0]])), "at least 2 completions .* found 1"),
        (lambda: leave_one_out_advantages(np.array([[1.0]])), "at least 2 completions .* found 1"),
        (lambda: combined_advantages(TWO[:, :1]), "at least 2 completions"),
        (lambda: group_advantages(np.eye(2), ddof=2), "ddof"),
        (lambda: group_advantages(np.eye(2), scale="grop"), "did you mean group"),
        (lambda: combined_advantages(TWO, np.ones(3)), "one finite weight for each of 2 rewards"),
        (lambda: combined_advantages(TWO, np.array([1.0, NAN])), "one finite weight"),
        (lambda: combined_advantages(TWO, aggregation="normalize_then_sum"), "did you mean normalise_then_sum"),
        (lambda: soft_overlong_penalty(np.array([1]), longest=5, buffer=6), "buffer"),
        (lambda: soft_overlong_penalty(np.array([1]), longest=5, buffer=0), "buffer"),
        (lambda: decide(np.array([True]), wanted=0, attempt=1, attempts=1), "wanted"),
        (lambda: decide(np.array([True]), wanted=1, attempt=3, attempts=2), "attempt 3"),
        (lambda: rewards_less_kl(np.zeros((1, 2)), np.zeros((1, 2, 3)), beta=-1.0), "beta"),
    ],
)
def test_bad_input_is_refused(call, named):
    with pytest.raises(ValueError, match=named):
        call()


def test_the_penalty_in_the_reward_counts_only_loss_tokens():
    logp, ref = np.full((1, 2, 3), -1.0), np.full((1, 2, 3), -1.5)
    weight = np.array([[[1.0, 1, 0], [1, 0, 0]]])
    ref[weight == 0] = np.inf
    assert_close(kl_per_token(logp, ref, weight), 0.5 * weight, 1e-12)
    kl = kl_per_token(logp, ref, weight, kind="k2")
    assert_close(rewards_less_kl(np.array([[1.0, 0.0]]), kl, beta=2.0), [[0.5, -0.25]], 1e-12)


def test_soft_overlong_penalty():
    """DAPO's own numbers: 16,384 tokens expected, a cache of 4,096, so 20,480 at most."""
    lengths = np.array([0, 16384, 16385, 18432, 20479, 20480, 20481, 99999])
    found = soft_overlong_penalty(lengths, longest=20480, buffer=4096)
    assert_close(found, [0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1, -1], 1e-12)
    assert not np.signbit(found[:2]).any()


@pytest.mark.parametrize(
    ("flat", "attempt", "expected"),
    [
        ([False, False, True], 1, Decision((0, 1), (), True, 2)),
        ([True, False, True, False], 1, Decision((1, 3), (), True, 2)),
        ([True, False, True], 1, Decision((1,), (0,), False, 1)),
        ([True, True, True], 2, Decision((), (0, 1), False, 0)),
        # The last attempt: flat groups fill the batch.
        ([True, False, True], 3, Decision((1, 0), (), True, 1)),
        ([True, True, True], 3, Decision((0, 1), (), True, 0)),
    ],
)
def test_dynamic_sampling(flat, attempt, expected):
    assert decide(np.array(flat), wanted=2, attempt=attempt, attempts=3) == expected


def test_dynamic_sampling_ends():
    """Rounds of groups that never differ stop after the last attempt with a full batch."""
    flat, attempt = np.ones(4, bool), 1
    while not (decision := decide(flat, wanted=4, attempt=attempt, attempts=5)).stop:
        flat, attempt = np.concatenate([flat, np.ones(len(decision.resample), bool)]), attempt + 1
    assert attempt == 5
    assert decision.keep == (0, 1, 2, 3)


def test_unknown_scale():
    with pytest.raises(ValueError, match="none, group, batch; found 'std'"):
        group_advantages(np.array([[1.0, 0.0]]), scale="std")
