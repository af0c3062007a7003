"""Is the form right: 1 for `<think>..</think> <solution>..</solution>`, else 0. With weight 0 it logs the valid share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.tasks.blocks import ALLOWED, read_blocks


@dataclass(frozen=True)
class FormatReward:
    """1.0 where the completion's tags are those of `form` (see `read_blocks`), by default think, then solution; else 0.0."""

    alone: bool = False  #: also require that nothing but white space stands outside the blocks
    form: str = "think"  #: or "solution", "plain"

    def __post_init__(self) -> None:
        if self.form not in ALLOWED:
            raise ValueError(f"form must be one of {', '.join(ALLOWED)}, found {self.form!r}")

    def score(self, completion: str) -> float:
        """
        >>> FormatReward(alone=True).score("<think>x</think><solution>y</solution> Done.")
        0.0
        """
        blocks = read_blocks(completion, self.form)
        return float(blocks.reason is None and not (self.alone and blocks.outside))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        del prompts, columns
        return [self.score(text) for (text,) in aligned(completions)]
