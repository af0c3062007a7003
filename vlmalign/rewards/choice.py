"""Multiple choice: are the option letters that an answer settles on the right ones?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.tasks.choice_letters import choice_letters


@dataclass(frozen=True)
class ChoiceReward:
    """1.0 if the completion's choice equals the column `answer`, else 0.0 (BalancedBio eq. 7, R_acc, option keys).

    `answer` is a letter, or several ("ABD", in any order) where the question asks for all that apply: then the set
    must be exactly right. None where `answer` is None. Raises ValueError for an answer of other letters.
    """

    letters: str = "ABCDE"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Z]+", self.letters) or len(set(self.letters)) < len(self.letters):
            raise ValueError(f"letters must be different capital letters such as 'ABCDE', found {self.letters!r}")

    def score(self, completion: str, *, answer: str) -> float:
        if not answer or set(answer) - set(self.letters):
            raise ValueError(f"answer must be one or more of the letters {self.letters}, found {answer!r}")
        return float(choice_letters(completion, self.letters) == "".join(sorted(set(answer))))

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, answer: Sequence[str | None], **columns: Any
    ) -> list[float | None]:
        del prompts, columns
        rows = aligned(completions, answer=answer)
        return [None if right is None else self.score(text, answer=right) for text, right in rows]
