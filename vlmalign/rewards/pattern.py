"""Does a regular expression match: 1 or 0, with a bound on the time and the text, since a pattern can take for ever."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex

from vlmalign.rewards.contract import aligned
from vlmalign.tasks.blocks import answer_of


@dataclass(frozen=True)
class PatternReward:
    """1.0 where `pattern` is found in the completion, else 0.0.

    Python's `re` cannot be interrupted, so patterns are matched by the `regex` package (a superset of its syntax).
    One that takes longer than `seconds` raises TimeoutError, which a runner counts as a time-out of that completion
    alone. A text of more than `max_chars` characters is not searched and counts as no match.

    Raises ValueError for a pattern that does not compile and for bounds that are not positive.
    """

    pattern: str  #: flags stand in it: (?i), (?s), (?m)
    whole: bool = False  #: the whole text must match, rather than any part of it
    where: str = "text"  #: or "answer": the solution block (see `answer_of`)
    seconds: float = 0.5  #: about, for one completion
    max_chars: int = 50_000

    def __post_init__(self) -> None:
        try:
            _compiled(self.pattern)
        except regex.error as error:
            raise ValueError(f"pattern {self.pattern!r} does not compile: {error}; correct it") from error
        if self.where not in ("text", "answer"):
            raise ValueError(f"where must be text or answer, found {self.where!r}")
        if not (self.seconds > 0 and self.max_chars > 0):
            raise ValueError(f"seconds and max_chars must be > 0, found {self.seconds} and {self.max_chars}")

    def score(self, completion: str) -> float:
        """
        >>> PatternReward(r"(?i)impression:").score("FINDINGS: ... IMPRESSION: ...")
        1.0
        """
        text = completion if self.where == "text" else answer_of(completion)
        if len(text) > self.max_chars:
            return 0.0
        match = _compiled(self.pattern).fullmatch if self.whole else _compiled(self.pattern).search
        return float(match(text, timeout=self.seconds) is not None)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        del prompts, columns
        return [self.score(text) for (text,) in aligned(completions)]


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    return regex.compile(pattern)
