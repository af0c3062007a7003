"""Cases fall into bands and values; every case is in exactly one group, blanks and nonsense visibly."""

import doctest

import numpy as np
import pytest

from vlmalign.evaluation import subgroups
from vlmalign.evaluation.subgroups import groups_of


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(subgroups).failed == 0


def test_bands_agree_with_numpy():
    ages = np.random.default_rng(0).integers(0, 96, 500)
    found = groups_of([str(age) for age in ages], (18, 40, 60, 80))
    theirs = np.digitize(ages, (18, 40, 60, 80))
    assert list(found) == ["below 18", "18 to below 40", "40 to below 60", "60 to below 80", "80 and above"]
    assert list(found.values()) == [np.flatnonzero(theirs == band).tolist() for band in range(5)]


@pytest.mark.parametrize("grouping", ["values", (50.0,)])
def test_every_case_is_in_one_group(grouping):
    cells = ["F", "", None, "61", " ", "nan", "12.5", "M", 50]
    found = groups_of(cells, grouping)
    assert sorted(place for places in found.values() for place in places) == list(range(len(cells)))
    assert found["not given"] == [1, 2, 4]
    if grouping != "values":
        assert found["not a number"] == [0, 5, 7]
