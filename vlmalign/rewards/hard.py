"""The hard reward: overlap of predicted and true labels (as printed the Jaccard index), less a constant for a completion that is too short.

Rewards have no unit; this one lies in [-lambda_len, 1]. Lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmalign.rewards.contract import aligned
from vlmalign.rewards.frequency import Frequency, check_frequency, check_rarest, inverse
from vlmalign.rewards.overlap import check_measure, overlap
from vlmalign.tasks.label_reader import LabelReader, label_reader


class Breakdown(NamedTuple):
    """One completion's reward by component: total = overlap - length_penalty."""

    valid: bool
    overlap: float  #: J, in [0, 1]; 0 if not valid
    length_penalty: float  #: lambda_len if valid and too short, else 0
    total: float


@dataclass(frozen=True)
class HardReward:
    """Hard reward of ChexReason (arXiv 2512.23090), callable with the signature TRL gives reward functions.

        r = J - lambda_len   if valid and |t| <  min_tokens
        r = J                if valid and |t| >= min_tokens
        r = 0                if not valid
        J = |Y n P| / |Y u P|,  Y = true labels (`truth`), P = predicted labels, t = completion

    The paper prints 250 but neither its unit nor lambda_len. Ours: |t| is the number of tokens of the whole completion
    (tags, solution and stop token included); lambda_len = 0.2 (the published reward curve reaches -0.15, so
    lambda_len >= 0.15); J = 1 when Y is empty and the solution is too, but 0 when the solution names something unknown.
    What is valid, and how labels are read: see `LabelReader.read`.

    Not in the paper: with `measure` and `frequency` J becomes the F1 of the two sets, or one of the two with every label
    weighted by the inverse of its frequency (see `LabelOverlap`).

    Danger: a valid, short, wrong answer (-lambda_len) scores below an invalid one (0). A policy that is mostly wrong
    and short is paid for breaking the form; watch the share of valid completions.

    Raises ValueError for a field out of range and for labels that cannot be told apart.
    """

    labels: tuple[str, ...] | LabelReader  #: the label schema, or a task's reader of it
    min_tokens: int = 250  #: tokens, >= 0; shorter valid completions pay lambda_len; 0 turns the length term off
    lambda_len: float = 0.2  #: in [0, 1], the range of J
    measure: str = "jaccard"  #: or "f1"
    frequency: Frequency | None = None  #: share of films with each label, whose inverse weighs it; None: all alike
    rarest: float = 0.01  #: in (0, 1]; smaller shares count as this one

    def __post_init__(self) -> None:
        names = label_reader(self.labels).labels
        check_measure(self.measure)
        check_rarest(self.rarest)
        if self.frequency is not None:
            check_frequency(names, self.frequency)
        if self.min_tokens < 0:
            raise ValueError(
                f"min_tokens must be >= 0 tokens, found {self.min_tokens}; set 0 to turn the length term off"
            )
        if not 0 <= self.lambda_len <= 1:
            raise ValueError(
                f"lambda_len must lie in [0, 1], the range of the overlap, found {self.lambda_len}; set e.g. 0.2"
            )

    def score(self, completion: str, *, truth: Iterable[str], completion_tokens: int) -> Breakdown:
        """One completion's reward by component. Raises ValueError for a true label outside the schema."""
        reader = label_reader(self.labels)
        true = reader.true_set(truth)
        if completion_tokens < 0:
            raise ValueError(f"completion_tokens must be >= 0, found {completion_tokens}; give the length in tokens")
        parsed = reader.read(completion)
        if not parsed.valid:
            return Breakdown(valid=False, overlap=0.0, length_penalty=0.0, total=0.0)
        weights = None if self.frequency is None else inverse(reader.labels, self.frequency, self.rarest)
        found = frozenset(parsed.predicted)
        agreed = overlap(self.measure, true, found, weights) if found or parsed.says_nothing else 0.0
        penalty = self.lambda_len if completion_tokens < self.min_tokens else 0.0
        return Breakdown(valid=True, overlap=agreed, length_penalty=penalty, total=agreed - penalty)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        truth: Sequence[Iterable[str]],
        completion_tokens: Sequence[int],
        **columns: Any,
    ) -> list[float | None]:
        """One reward per completion; never None. Other columns of the data set are accepted and not used.

        Raises ValueError if the columns differ in length.
        """
        del prompts, columns
        rows = aligned(completions, truth=truth, completion_tokens=completion_tokens)
        return [self.score(text, truth=true, completion_tokens=length).total for text, true, length in rows]
