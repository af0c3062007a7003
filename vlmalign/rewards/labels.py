"""Overlap of predicted and true label sets, by Jaccard index or F1, in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.rewards.hard import jaccard
from vlmalign.tasks.label_reader import LabelReader, label_reader
from vlmalign.tasks.spelling import fold


@dataclass(frozen=True)
class LabelOverlap:
    """Overlap of the labels Y (column `truth`) and P (read from the solution), 0 for a completion of invalid form.

        jaccard = |Y n P| / |Y u P|        f1 = 2 |Y n P| / (|Y| + |P|)        1 where Y and P are both empty

    and 0 where the solution names nothing but unknown labels.

    None where `truth` is None: the completion belongs to another task.

    Raises ValueError for unusable fields, and for a true label outside the schema.
    """

    labels: tuple[str, ...] | LabelReader  #: the label schema, or a task's reader of it
    measure: str = "jaccard"  #: or "f1"
    alone: bool = False  #: text outside the blocks makes the form invalid
    count_unknown: bool = False  #: names outside the schema count in P (as different labels) rather than being dropped
    normal: str | None = None  #: the label that excludes all others ("No Finding"): with another one, the reward is 0
    empty_is_normal: bool = False  #: an empty solution stands for `normal`

    def __post_init__(self) -> None:
        names = label_reader(self.labels).labels
        if self.measure not in ("jaccard", "f1"):
            raise ValueError(f"measure must be jaccard or f1, found {self.measure!r}")
        if self.normal is not None and self.normal not in names:
            raise ValueError(f"normal must be one of the labels {names}, found {self.normal!r}")
        if self.empty_is_normal and self.normal is None:
            raise ValueError("empty_is_normal needs normal, found None; name the label an empty solution stands for")

    def score(self, completion: str, *, truth: Iterable[str]) -> float:
        reader = label_reader(self.labels)
        true = reader.true_set(truth)
        parsed = reader.read(completion)
        if not parsed.valid or (self.alone and parsed.outside):
            return 0.0
        found = frozenset(parsed.predicted)
        if self.count_unknown:
            found |= {fold(name) for name in parsed.unknown}
        elif parsed.unknown and not found:
            return 0.0
        if self.empty_is_normal and not found:
            found = frozenset({str(self.normal)})
        if self.normal in found and len(found) > 1:
            return 0.0
        return jaccard(true, found) if self.measure == "jaccard" else set_f1(true, found)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        truth: Sequence[Iterable[str] | None],
        **columns: Any,
    ) -> list[float | None]:
        del prompts, columns
        return [
            None if true is None else self.score(text, truth=true) for text, true in aligned(completions, truth=truth)
        ]


def set_f1(first: frozenset[str], second: frozenset[str]) -> float:
    """2 |first n second| / (|first| + |second|), in [0, 1]; 1 when both are empty.

    >>> set_f1(frozenset({"Edema", "Fracture"}), frozenset({"Edema"}))
    0.6666666666666666
    """
    total = len(first) + len(second)
    return 2 * len(first & second) / total if total else 1.0
