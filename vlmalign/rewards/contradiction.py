"""Contradiction: a price on an answer that says "No Finding" and names a finding as well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.tasks.label_reader import LabelReader, label_reader


@dataclass(frozen=True)
class Contradiction:
    """-1.0 where the solution names `normal` together with another label that it excludes, else 0.0.

    Its weight in a config is the price. A completion of invalid form says nothing and earns 0; unknown names are no
    findings. In CheXpert and MIMIC-CXR a film of "No Finding" may have support devices, which `beside` then names:
    without it, the right answer to such a film is charged.

    Raises ValueError for names outside the schema.
    """

    labels: tuple[str, ...] | LabelReader  #: the label schema, or a task's reader of it
    normal: str  #: the label that excludes others; in a study by default the task's own
    beside: tuple[str, ...] = ()  #: labels that may stand beside it

    def __post_init__(self) -> None:
        names = label_reader(self.labels).labels
        if self.normal not in names:
            raise ValueError(f"normal must be one of the labels {names}, found {self.normal!r}")
        if unknown := [label for label in self.beside if label not in names or label == self.normal]:
            raise ValueError(f"beside must hold labels other than {self.normal!r} of {names}, found {unknown[0]!r}")

    def score(self, completion: str) -> float:
        """
        >>> Contradiction(("No Finding", "Edema"), "No Finding").score("<think></think><solution>No Finding, Edema</solution>")
        -1.0
        """
        found = label_reader(self.labels).read(completion).predicted
        excluded = set(found) - {self.normal, *self.beside}
        return -1.0 if self.normal in found and excluded else 0.0

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        del prompts, columns
        return [self.score(text) for (text,) in aligned(completions)]
