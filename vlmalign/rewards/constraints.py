"""Instruction following: the share of a prompt's constraints that a completion satisfies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.tasks.blocks import answer_of
from vlmalign.tasks.constraints import satisfied


@dataclass(frozen=True)
class ConstraintShare:
    """R_inst of BalancedBio (eq. 9): satisfied constraints / constraints, in [0, 1].

    The column `constraints` holds a list per completion, of the kinds in `tasks.constraints`. None where there is none.

    Ours: they are checked in the answer (see `answer_of`), not in the reasoning before it.

    Raises ValueError for a constraint of another kind or with other arguments.
    """

    def score(self, completion: str, *, constraints: Sequence[Mapping[str, Any]]) -> float:
        """
        >>> ConstraintShare().score("- one", constraints=[{"kind": "bullets"}, {"kind": "json"}])
        0.5
        """
        answer = answer_of(completion)
        return sum(satisfied(answer, constraint) for constraint in constraints) / len(constraints)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        constraints: Sequence[Sequence[Mapping[str, Any]] | None],
        **columns: Any,
    ) -> list[float | None]:
        del prompts, columns
        rows = aligned(completions, constraints=constraints)
        return [self.score(text, constraints=found) if found else None for text, found in rows]
