"""ChexReason's nuanced reward: a large bonus for an exact answer, graded credit, and a price on every kind of mistake.

Its collapse term looks back over earlier predictions and is a reward with memory of its own (`collapse`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmalign.rewards.contract import aligned
from vlmalign.rewards.frequency import Frequency, check_frequency, shares
from vlmalign.tasks.label_reader import LabelReader, label_reader


class NuancedBreakdown(NamedTuple):
    """One completion's reward by component: total = match + partial - false_positives - form."""

    match: float
    partial: float
    false_positives: float  #: >= 0
    form: float  #: >= 0
    total: float


@dataclass(frozen=True)
class NuancedReward:
    """The nuanced reward of ChexReason (arXiv 2512.23090) without its collapse term, about -200 to 150:

        r = match + partial - false positives - form
        match = 100 if P = Y        partial = 30 |Y n P| / |Y| + 20 |Y n P| / |P|
        false positives = sum over P \\ Y of false_positive x frequency of the label
        form = 100 per unknown name + 25 per duplicate + outside_text if text stands outside the blocks

    The paper prints 100, 30, 20, 100 and 25 and that false positives are weighted by label frequency. Ours:
    `false_positive` = 100, `outside_text` = 25; an invalid form scores -100, as one unknown name does; recall and
    precision are 1 when Y and P are both empty, else 0 where their denominator is; a solution of unknown names only is
    not empty.

    Danger: its scale is about 100 times the hard reward's, so without scaling by the group's standard deviation its
    steps are 100 times as large.

    Raises ValueError for fields out of range and for a true label outside the schema.
    """

    labels: tuple[str, ...] | LabelReader  #: the label schema, or a task's reader of it
    frequency: Frequency = "training"  #: share of training films with each label
    false_positive: float = 100.0  #: >= 0, price of a false positive of a label that every film has
    outside_text: float = 25.0  #: >= 0
    invalid: float = 100.0  #: >= 0, price of an invalid form

    def __post_init__(self) -> None:
        check_frequency(label_reader(self.labels).labels, self.frequency)
        for name in ("false_positive", "outside_text", "invalid"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is a price and must be >= 0, found {getattr(self, name)}")

    def score(self, completion: str, *, truth: Iterable[str]) -> NuancedBreakdown:
        """One completion's reward by component."""
        reader = label_reader(self.labels)
        true = reader.true_set(truth)
        parsed = reader.read(completion)
        if not parsed.valid:
            return NuancedBreakdown(0.0, 0.0, 0.0, self.invalid, -self.invalid)
        found = frozenset(parsed.predicted)
        hits = len(true & found)
        both_empty = float(not true and parsed.says_nothing)
        recall = hits / len(true) if true else both_empty
        precision = hits / len(found) if found else both_empty
        match = 100.0 if true == found and (true or parsed.says_nothing) else 0.0
        partial = 30 * recall + 20 * precision
        share = shares(reader.labels, self.frequency)
        # In the order of the schema, not of a set: sums of floats must not depend on the process's hash seed.
        wrong = sum(self.false_positive * share[label] for label in parsed.predicted if label not in true)
        form = 100.0 * len(parsed.unknown) + 25.0 * parsed.duplicates + (self.outside_text if parsed.outside else 0.0)
        return NuancedBreakdown(match, partial, float(wrong), form, match + partial - wrong - form)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, truth: Sequence[Iterable[str]], **columns: Any
    ) -> list[float | None]:
        del prompts, columns
        return [self.score(text, truth=true).total for text, true in aligned(completions, truth=truth)]
