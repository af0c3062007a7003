"""Floors and caps of labels: from shares and numbers of films, as a user gives them, to films of each set.

A bound is a share of the set (a float, 0..1) or a number of films (an int), as in scikit-learn: 0.05 of 2,000 films are
100 films, 1.0 is the whole set, 1 is one film.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

Bound = float | int

#: 5 % of 2,000 films are 100, not 101
_ROUNDING = 1e-9


class Bounds(NamedTuple):
    """What every label must reach and must not exceed in every set."""

    asked: np.ndarray  #: [labels, sets] float64, films: the floor before it is rounded up
    floor: np.ndarray  #: [labels, sets] int64, films
    cap: np.ndarray  #: [labels, sets] int64, films; the size of the set where there is no cap


def bounds_of(
    label_names: Sequence[str],
    sizes: Mapping[str, int],
    *,
    floor: Bound,
    floors: Mapping[str, Bound],
    cap: Bound | None,
    caps: Mapping[str, Bound],
) -> Bounds:
    """Bounds in films: `floors` and `caps` are of single labels, which `floor` and `cap` then do not hold for.

    >>> found = bounds_of(["a", "b"], {"s": 30}, floor=0.05, floors={"b": 4}, cap=0.5, caps={})
    >>> found.asked.tolist(), found.floor.tolist(), found.cap.tolist()
    ([[1.5], [4.0]], [[2], [4]], [[15], [15]])

    Raises:
        ValueError: for a label that is not there, a share outside 0..1, a negative number of films, or a floor above a
            set's size or a label's cap.
    """
    for name, given in (("floors", floors), ("caps", caps)):
        if unknown := [label for label in given if label not in label_names]:
            near = difflib.get_close_matches(unknown[0], label_names, n=1)
            hint = f"the nearest label is {near[0]!r}" if near else f"labels are {', '.join(label_names)}"
            raise ValueError(f"{name}: no label is called {unknown[0]!r}; {hint}")
    size = np.array(list(sizes.values()), np.float64)
    low = [_films(floors.get(label, floor), size, f"floor of {label}") for label in label_names]
    high = [
        size if (of := caps.get(label, cap)) is None else _films(of, size, f"cap of {label}") for label in label_names
    ]
    asked = np.array(low)
    found = Bounds(
        asked,
        np.ceil(asked - _ROUNDING).astype(np.int64),
        np.minimum(size, np.floor(np.array(high) + _ROUNDING)).astype(np.int64),
    )
    for label, set in np.argwhere(found.floor > found.cap)[:1].tolist():
        name = list(sizes)[set]
        raise ValueError(
            f"the floor of {label_names[label]} is {found.floor[label, set]} films of set {name}, more than its cap or the "
            f"set's size, {found.cap[label, set]}; lower the floor or raise the cap"
        )
    return found


def share_of(bound: Bound, sizes: Mapping[str, int]) -> float:
    """The least share of any of the sets that a bound stands for, 0..1.

    >>> share_of(0.05, {"sft": 200, "rl": 100}), share_of(10, {"sft": 200, "rl": 100})
    (0.05, 0.05)
    """
    return bound / max(sizes.values()) if isinstance(bound, int | np.integer) else bound


def _films(bound: Bound, size: np.ndarray, what: str) -> np.ndarray:
    """The bound in films of sets of these sizes, [sets] float64, not yet rounded."""
    if isinstance(bound, int | np.integer) and bound >= 0:
        return np.full(len(size), float(bound))
    if not isinstance(bound, int | np.integer) and 0 <= bound <= 1:
        return bound * size
    raise ValueError(f"{what} must be a share of the set, 0..1, or a number of films (an integer >= 0), found {bound}")
