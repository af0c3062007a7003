"""Advantages from rewards, as a table worked by hand."""

import numpy as np
import pytest
from tiny_checkpoints import assert_close

from vlmalign.objectives.advantages import EPSILON, group_advantages

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


def test_unknown_scale():
    with pytest.raises(ValueError, match="none, group, batch; found 'std'"):
        group_advantages(np.array([[1.0, 0.0]]), scale="std")
