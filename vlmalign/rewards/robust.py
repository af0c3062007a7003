"""Overlap under several label conventions at once, less its spread: what one convention alone rewards pays little."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmalign.data.sources.schema import SCHEMAS, unknown_label
from vlmalign.rewards.contract import score_each
from vlmalign.rewards.overlap import check_measure, overlap
from vlmalign.tasks.label_reader import LabelReader, label_reader

#: a schema, whose names are kept and all others dropped; or label -> the name, or names, that it has in the convention,
#: None for one that the convention does not know (labels that are not listed keep their names)
Convention = str | Mapping[str, str | Sequence[str] | None]


class RobustBreakdown(NamedTuple):
    """One completion's reward by component: total = mean - spread."""

    valid: bool
    overlaps: dict[str, float]  #: convention -> overlap in [0, 1]; "own" is the schema itself; empty if not valid
    mean: float
    spread: float  #: the price x the standard deviation
    total: float


@dataclass(frozen=True)
class RobustOverlap:
    """A reward against over-fitting one labelling convention; ours.

        r = mean_c o_c - spread x std_c o_c        o_c = overlap of c(Y) and c(P)        r = 0 if not valid

    Y are the true labels (`truth`), P the predicted ones; c runs over the schema itself and each of `conventions`, and
    tells a set of labels as that convention would: names that it lacks are dropped, labels that it does not tell apart
    become one, parents that it implies are added. std divides by the number of conventions. With one convention beside
    the schema and spread = 1, r is the smaller of the two overlaps.

    o_c is 1 where c(Y) and c(P) are both empty, as it is in a score of films whose findings the convention lacks. A
    solution of unknown names only earns 0.

    Danger: above spread = 1 / sqrt(number of conventions, `own` included, - 1), being right in one convention more can
    lower r.

    None where `truth` is None: the completion belongs to another task.

    Raises ValueError for unusable fields, and for a true label outside the schema.
    """

    labels: tuple[str, ...] | LabelReader  #: the label schema, or a task's reader of it
    conventions: Mapping[str, Convention]  #: name -> convention, at least one
    spread: float = 0.5  #: >= 0, price of a standard deviation of 1
    measure: str = "jaccard"  #: or "f1"

    def __post_init__(self) -> None:
        names = label_reader(self.labels).labels
        check_measure(self.measure)
        if not self.spread >= 0:
            raise ValueError(f"spread is a price and must be >= 0, found {self.spread}")
        if not self.conventions:
            raise ValueError("conventions must hold at least one beside the schema itself, found none; name one")
        if "own" in self.conventions:
            raise ValueError("conventions: own is the schema itself and always counts; give this one another name")
        for name, convention in self.conventions.items():
            if isinstance(convention, str):
                if convention not in SCHEMAS:
                    raise ValueError(
                        f"conventions.{name} must be a table of labels or one of {', '.join(SCHEMAS)}, found {convention!r}"
                    )
                if not set(names) & set(SCHEMAS[convention].labels):
                    raise ValueError(f"conventions.{name}: the schema {convention} has none of the labels {names}")
            elif unknown := [label for label in convention if label not in names]:
                raise ValueError(f"conventions.{name}: {unknown_label(unknown[0], names, 'labels')}")

    def score(self, completion: str, *, truth: Iterable[str]) -> RobustBreakdown:
        """One completion's reward by component.

        >>> reward = RobustOverlap(("Mass", "Nodule", "Edema"), {"lesions": {"Mass": "Lesion", "Nodule": "Lesion"}}, spread=1.0)
        >>> reward.score("<think></think><solution>Mass, Edema</solution>", truth=["Nodule", "Edema"]).overlaps
        {'own': 0.3333333333333333, 'lesions': 1.0}
        """
        reader = label_reader(self.labels)
        true = reader.true_set(truth)
        parsed = reader.read(completion)
        if not parsed.valid:
            return RobustBreakdown(False, {}, 0.0, 0.0, 0.0)
        found = frozenset(parsed.predicted)
        told: dict[str, Convention] = {"own": {}, **self.conventions}
        overlaps = {
            name: overlap(self.measure, told_in(convention, true), told_in(convention, found))
            if found or parsed.says_nothing
            else 0.0
            for name, convention in told.items()
        }
        mean, spread = statistics.fmean(overlaps.values()), self.spread * statistics.pstdev(overlaps.values())
        return RobustBreakdown(True, overlaps, mean, spread, mean - spread)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        truth: Sequence[Iterable[str] | None],
        **columns: Any,
    ) -> list[float | None]:
        del prompts, columns
        return score_each(lambda text, truth: self.score(text, truth=truth).total, completions, truth)


def told_in(convention: Convention, labels: Iterable[str]) -> frozenset[str]:
    """A set of labels as a convention tells it.

    >>> sorted(told_in({"Edema": ["Edema", "Lung Opacity"], "Fracture": None}, ["Edema", "Fracture", "Pneumonia"]))
    ['Edema', 'Lung Opacity', 'Pneumonia']
    """
    if isinstance(convention, str):
        return frozenset(labels) & frozenset(SCHEMAS[convention].labels)
    names: set[str] = set()
    for label in labels:
        name = convention.get(label, label)
        names.update([name] if isinstance(name, str) else name or ())
    return frozenset(names)
