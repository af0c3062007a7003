"""Iterative stratification: the paper's rule on a table worked out by hand, and shares that are kept."""

import numpy as np
import pytest

from vlmalign.data.sampling.stratification import stratify


def test_the_rarest_label_comes_first():
    # b is on two films, of which each half wants one; a alone would be indifferent to which films they are
    labels = np.array([[1, 0], [1, 1], [1, 0], [1, 1]], bool)
    for seed in range(8):
        (half,) = stratify(labels, [2], seed=seed)
        assert labels[half].sum(0).tolist() == [2, 1]


@pytest.mark.parametrize("seed", range(5))
def test_every_label_keeps_its_share(seed):
    rng = np.random.default_rng(seed)
    labels = rng.random((2000, 8)) < [0.5, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005]
    parts = stratify(labels, [200, 100], seed=seed)
    assert not set(parts[0]) & set(parts[1])
    for part, size in zip(parts, (200, 100), strict=True):
        assert abs(len(part) - size) <= 6
        wanted = labels.sum(0) * size / 2000
        assert np.abs(labels[part].sum(0) - wanted).max() <= 4
        # a random draw is farther off: 4 standard deviations of the most frequent label are 28 and 20 films
    again = stratify(labels, [200, 100], seed=seed)
    assert all((one == other).all() for one, other in zip(parts, again, strict=True))


def test_films_without_labels_fill_parts_up_and_sizes_have_a_bound():
    (part,) = stratify(np.zeros((10, 2), bool), [4], seed=0)
    assert len(part) == 4
    with pytest.raises(ValueError, match="10 films or fewer"):
        stratify(np.zeros((10, 2), bool), [6, 5], seed=0)
