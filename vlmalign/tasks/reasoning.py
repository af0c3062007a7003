"""Does the reasoning of an answer agree with its labels? Counted by the rule of `mentions`; no judge, and no truth.

With S the labels of the solution, N those of them that the think block names as present, and C the labels of the
vocabulary that it claims:

    named = |N| / |S|        kept = |C n S| / |C|

An answer whose labels its reasoning never mentions has a low `named`, one that drops what it has found a low `kept`. A
think block that lists everything has named = 1 and a low kept. Neither says that anything is right.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from vlmalign.tasks.mentions import claimed, named


class Agreement(NamedTuple):
    """Counts of labels, which add up over answers and are divided once."""

    solution: int  #: labels of the solution, |S|
    named: int  #: of these, the think block names as present, |N|
    claimed: int  #: labels that the think block claims, |C|
    kept: int  #: of these, the solution has, |C n S|

    @property
    def named_share(self) -> float | None:
        """None for an empty solution."""
        return self.named / self.solution if self.solution else None

    @property
    def kept_share(self) -> float | None:
        """None where the think block claims nothing."""
        return self.kept / self.claimed if self.claimed else None


def agreement(
    think: str, solution: Iterable[str], labels: Iterable[str], synonyms: Mapping[str, Sequence[str]] = {}
) -> Agreement:
    """The text of a think block beside the labels of its solution; only what stands in `labels` counts.

    Wide words ("an opacity") are enough to name a label of the solution, and claim no other one.

    >>> agreement("The heart is enlarged. No effusion.", ["Cardiomegaly", "Edema"], ["Cardiomegaly", "Edema", "Fracture"])
    Agreement(solution=2, named=1, claimed=1, kept=1)
    """
    names = tuple(labels)
    said = [label for label in names if label in set(solution)]
    claims = claimed(think, names, synonyms)
    return Agreement(len(said), len(named(think, said, synonyms)), len(claims), sum(label in said for label in claims))


def together(answers: Iterable[Agreement]) -> Agreement:
    """The counts of several answers, added up."""
    return Agreement(*map(sum, zip((0, 0, 0, 0), *answers, strict=True)))
