"""Is the form right: 1 for `<think>..</think> <solution>..</solution>`, else 0. With weight 0 it logs the valid share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned
from vlmalign.rewards.parse import read_blocks


@dataclass(frozen=True)
class FormatReward:
    """1.0 where the completion's tags are exactly think, then solution (see `parse_completion`), else 0.0."""

    alone: bool = False  #: also require that nothing but white space stands outside the blocks

    def score(self, completion: str) -> float:
        """
        >>> FormatReward(alone=True).score("<think>x</think><solution>y</solution> Done.")
        0.0
        """
        blocks = read_blocks(completion)
        return float(blocks.reason is None and not (self.alone and blocks.outside))

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        del prompts, columns
        return [self.score(text) for (text,) in aligned(completions)]
