"""The numbers of a step's completions: means over what is known, counts of what is not, groups that teach nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vlmalign.reporting.completion_rows import Completion, PromptGroup


class Figures(NamedTuple):
    """Of some groups of completions. A mean of nothing is None."""

    prompts: int
    completions: int
    unscored: int  #: completions without a reward
    flat: int  #: groups in which no two rewards differ
    with_unscored: int  #: groups that hold a completion without a reward
    reward: float | None  #: mean over the scored
    stopped: float  #: share in [0, 1] that ended by itself, not at the length limit
    tokens: float  #: mean
    parts: dict[str, float | None]  #: component -> mean over the completions that have it


def figures(groups: Sequence[PromptGroup]) -> Figures:
    """The figures of at least one group."""
    every = [one for group in groups for one in group.completions]
    return Figures(
        prompts=len(groups),
        completions=len(every),
        unscored=sum(group.unscored for group in groups),
        flat=sum(group.flat for group in groups),
        with_unscored=sum(group.unscored > 0 for group in groups),
        reward=mean(one.reward for one in every),
        stopped=sum(one.stopped for one in every) / len(every),
        tokens=sum(one.tokens for one in every) / len(every),
        parts={name: mean(one.parts.get(name) for one in every) for name in part_names(every)},
    )


def part_names(completions: Iterable[Completion]) -> list[str]:
    """Every component, in the order in which they first occur."""
    return list(dict.fromkeys(name for one in completions for name in one.parts))


def mean(values: Iterable[float | None]) -> float | None:
    """Over the values that are known.

    >>> mean([1.0, None, 0.5]), mean([None])
    (0.75, None)
    """
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
