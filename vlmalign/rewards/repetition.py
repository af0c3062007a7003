"""A penalty for saying the same thing again: the share of repeated token n-grams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned


@dataclass(frozen=True)
class RepetitionPenalty:
    """-(1 - distinct n-grams / all n-grams) x `weight`, over the token ids (column `completion_ids`).

    "Demystifying Long Chain-of-Thought Reasoning in LLMs" (arXiv 2502.03373, appendix C.2), in the form TRL gives it:
    one number per completion in [-weight, 0]; 0 for fewer than n tokens.
    """

    n: int = 3  #: tokens, >= 1
    weight: float = 1.0  #: >= 0

    def __post_init__(self) -> None:
        if self.n < 1 or not self.weight >= 0:
            raise ValueError(
                f"a repetition penalty needs n >= 1 and weight >= 0, found n={self.n}, weight={self.weight}"
            )

    def score(self, ids: Sequence[int]) -> float:
        """
        >>> RepetitionPenalty(n=2).score([5, 5, 5, 5, 5])
        -0.75
        """
        ids = [int(token) for token in ids]
        grams = [tuple(ids[i : i + self.n]) for i in range(len(ids) - self.n + 1)]
        repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
        return -repeated * self.weight if repeated else 0.0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, completion_ids: Sequence[Any], **columns: Any
    ) -> list[float | None]:
        del prompts, columns
        return [self.score(ids) for _, ids in aligned(completions, completion_ids=completion_ids)]
