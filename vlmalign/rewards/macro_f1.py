"""The reward whose mean over films moves as macro-F1 does: every label counts alike, however rare it is."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import score_each
from vlmalign.rewards.frequency import Frequency, check_frequency, check_rarest, inverse
from vlmalign.tasks.label_reader import LabelReader, label_reader


@dataclass(frozen=True)
class MacroF1Gain:
    """What a completion adds to macro-F1, to first order; ours.

        r = (1 / L) sum over l in P of (1[l in Y] - level / 2) / f_l        r = -invalid if not valid

    Y are the true labels (`truth`), P the predicted ones, L is the number of labels of the schema and f_l the share of
    films with label l. Derivation: over N films F_l = 2 TP_l / (n_l + m_l), with n_l = N f_l true and m_l predicted
    labels. One more prediction of l changes it by about (2 1[l in Y] - F_l) / (n_l + m_l), which at m_l = n_l and
    F_l = `level` is 1 / N of its term above. So predicting a label pays where its probability exceeds level / 2, the
    threshold that maximises F1 (Lipton et al., arXiv 1402.1892), and a true label earns as much as its films are few.

    An empty answer earns 0, whatever the truth. Unknown names and duplicates are ignored. The range follows from the
    shares: a true positive earns (1 - level / 2) / (L f_l), a false one costs level / 2 / (L f_l).

    Danger: no film bounds its reward, so films with rare labels make the largest steps. Without a price on an invalid
    form a mostly wrong policy is paid for breaking it.

    None where `truth` is None: the completion belongs to another task.

    Raises ValueError for fields out of range and for a true label outside the schema.
    """

    labels: tuple[str, ...] | LabelReader  #: the label schema, or a task's reader of it
    frequency: Frequency = "training"  #: share of films with each label
    rarest: float = 0.01  #: in (0, 1]; smaller shares count as this one
    level: float = 0.5  #: in [0, 1], the F1 that is expected of a label; level / 2 is the price of a prediction
    invalid: float = 1.0  #: >= 0, price of an invalid form

    def __post_init__(self) -> None:
        check_frequency(label_reader(self.labels).labels, self.frequency)
        check_rarest(self.rarest)
        if not 0 <= self.level <= 1:
            raise ValueError(f"level is an F1 and must lie in [0, 1], found {self.level}")
        if not self.invalid >= 0:
            raise ValueError(f"invalid is a price and must be >= 0, found {self.invalid}")

    def score(self, completion: str, *, truth: Iterable[str]) -> float:
        """
        >>> reward = MacroF1Gain(("Fracture", "Edema"), frequency=(0.1, 0.5))
        >>> reward.score("<think></think><solution>Fracture, Edema</solution>", truth=["Fracture"])
        3.5
        """
        reader = label_reader(self.labels)
        true = reader.true_set(truth)
        parsed = reader.read(completion)
        if not parsed.valid:
            return -float(self.invalid)
        weights = inverse(reader.labels, self.frequency, self.rarest)
        gains = [weights[label] * ((label in true) - self.level / 2) for label in parsed.predicted]
        return float(sum(gains)) / len(reader.labels)

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
