"""Cases in groups by what is known of them: age in bands, sex, view. Scores of a group are those of its cases alone.

A group may lack labels that another has, so macro-F1 of two groups may be means over different labels; how many each was
taken over stands in its results. No difference between groups is tested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

#: "values": a group for each value; or the bounds of bands, ascending, each value from one bound to below the next
Grouping = Literal["values"] | tuple[float, ...]

NOT_GIVEN, NO_NUMBER = "not given", "not a number"


def groups_of(cells: Sequence[Any], grouping: Grouping) -> Mapping[str, list[int]]:
    """Name of each group that some case is in -> places of its cases. Blank cells are a group, the last; so are, among
    bands, cells that are no number.

    >>> dict(groups_of(["61", "39", None, "60 years", "40"], (40, 60)))
    {'below 40': [1], '40 to below 60': [4], '60 and above': [0], 'not a number': [3], 'not given': [2]}
    >>> dict(groups_of(["M", "F", "M"], "values"))
    {'F': [1], 'M': [0, 2]}
    """
    texts = ["" if cell is None else str(cell).strip() for cell in cells]
    if grouping == "values":
        names = [text or NOT_GIVEN for text in texts]
        order = sorted(set(names) - {NOT_GIVEN})
    else:
        names = [_band(text, grouping) for text in texts]
        order = [*_bands(grouping), NO_NUMBER]
    found: dict[str, list[int]] = {name: [] for name in (*order, NOT_GIVEN)}
    for place, name in enumerate(names):
        found[name].append(place)
    return {name: places for name, places in found.items() if places}


def _bands(bounds: Sequence[float]) -> list[str]:
    between = [f"{low:g} to below {high:g}" for low, high in pairwise(bounds)]
    return [f"below {bounds[0]:g}", *between, f"{bounds[-1]:g} and above"]


def _band(text: str, bounds: Sequence[float]) -> str:
    if not text:
        return NOT_GIVEN
    try:
        value = float(text)
    except ValueError:
        return NO_NUMBER
    return NO_NUMBER if math.isnan(value) else _bands(bounds)[sum(value >= bound for bound in bounds)]
