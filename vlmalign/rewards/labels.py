"""Overlap of predicted and true label sets, by Jaccard index or F1, plain or by inverse label frequency; in [0, 1]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import score_each
from vlmalign.rewards.frequency import Frequency, check_frequency, check_rarest, inverse
from vlmalign.rewards.overlap import check_measure, overlap
from vlmalign.tasks.label_reader import LabelReader, label_reader
from vlmalign.tasks.spelling import fold


@dataclass(frozen=True)
class LabelOverlap:
    """Overlap of the labels Y (column `truth`) and P (read from the solution), 0 for a completion of invalid form.

        jaccard = |Y n P| / |Y u P|        f1 = 2 |Y n P| / (|Y| + |P|)        1 where Y and P are both empty

    and 0 where one of them is, or the solution names nothing but unknown labels.

    With `frequency` a label counts w = 1 / max(share of films with it, `rarest`) instead of 1, so that |S| is the sum of
    the weights in S. The range stays [0, 1]. Within a film, rare labels then decide; between films nothing changes: a
    film of one label is worth 1, whichever it is, so that naming the most frequent label only still pays on most films.
    For a reward that moves as macro-F1 does, see `MacroF1Gain`.

    None where `truth` is None: the completion belongs to another task.

    Raises ValueError for unusable fields, and for a true label outside the schema.
    """

    labels: tuple[str, ...] | LabelReader  #: the label schema, or a task's reader of it
    measure: str = "jaccard"  #: or "f1"
    alone: bool = False  #: text outside the blocks makes the form invalid
    count_unknown: bool = False  #: names outside the schema count in P (as different labels) rather than being dropped
    normal: str | None = None  #: the label that excludes all others ("No Finding"): with another one, the reward is 0
    empty_is_normal: bool = False  #: an empty solution stands for `normal`
    frequency: Frequency | None = None  #: share of films with each label, whose inverse weighs it; None: all alike
    rarest: float = 0.01  #: in (0, 1]; smaller shares count as this one

    def __post_init__(self) -> None:
        names = label_reader(self.labels).labels
        check_measure(self.measure)
        check_rarest(self.rarest)
        if self.frequency is not None:
            check_frequency(names, self.frequency)
            if self.count_unknown:
                raise ValueError("count_unknown and frequency do not go together: an unknown name has no frequency")
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
        weights = None if self.frequency is None else inverse(reader.labels, self.frequency, self.rarest)
        return overlap(self.measure, true, found, weights)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        truth: Sequence[Iterable[str] | None],
        **columns: Any,
    ) -> list[float | None]:
        del prompts, columns
        return score_each(self.score, completions, truth)
