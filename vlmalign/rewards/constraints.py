"""Instruction following: the share of a prompt's constraints that a completion satisfies."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.rewards.json_schema import read_json
from vlmalign.rewards.parse import answer_of

_BULLET = re.compile(r"^[ \t]*[-*][ \t]+\S", re.MULTILINE)


def _is_json(text: str) -> bool:
    try:
        read_json(text)
    except ValueError:
        return False
    return True


def _within(count: int, low: float, high: float) -> bool:
    return low <= count <= high


def _lacks(text: str, words: Sequence[str]) -> bool:
    low = text.casefold()
    return not any(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", low) for word in words)


#: kind -> whether a text satisfies it; the other keys of the constraint are the arguments
CHECKS: Mapping[str, Callable[..., bool]] = MappingProxyType(
    {
        "json": lambda text: _is_json(text),
        "bullets": lambda text, low=1, high=float("inf"): _within(len(_BULLET.findall(text)), low, high),
        "words": lambda text, low=0, high=float("inf"): _within(len(text.split()), low, high),
        "forbidden": lambda text, words: _lacks(text, words),
    }
)


@dataclass(frozen=True)
class ConstraintShare:
    """R_inst of BalancedBio (eq. 9): satisfied constraints / constraints, in [0, 1].

    The column `constraints` holds a list per completion: {"kind": "json"}, {"kind": "bullets", "low": 3, "high": 5}
    (lines that begin with `-` or `*`), {"kind": "words", "high": 100} (separated by white space), {"kind":
    "forbidden", "words": ["cure"]} (whole words, without regard to case). None where there is none.

    Ours: they are checked in the answer (see `answer_of`), not in the reasoning before it.

    Raises ValueError for a constraint of another kind or with other arguments.
    """

    def score(self, completion: str, *, constraints: Sequence[Mapping[str, Any]]) -> float:
        """
        >>> ConstraintShare().score("- one", constraints=[{"kind": "bullets"}, {"kind": "json"}])
        0.5
        """
        answer = answer_of(completion)
        return sum(_satisfied(answer, constraint) for constraint in constraints) / len(constraints)

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


def _satisfied(text: str, constraint: Mapping[str, Any]) -> bool:
    arguments = dict(constraint)
    kind = arguments.pop("kind", None)
    if kind not in CHECKS:
        raise ValueError(f"a constraint's kind must be one of {sorted(CHECKS)}, found {kind!r}")
    try:
        return CHECKS[kind](text, **arguments)
    except TypeError as error:
        raise ValueError(f"constraint {dict(constraint)} has the wrong arguments: {error}") from error
