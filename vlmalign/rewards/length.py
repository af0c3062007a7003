"""Length in tokens: 0 inside a band, down to -1 outside it, in straight lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.rewards.contract import aligned


@dataclass(frozen=True)
class LengthBand:
    """A penalty in [-1, 0] for a completion of n tokens (column `completion_tokens`):

        n < low:   max(-1, (n - low) / low_ramp)
        n > high:  max(-1, (high - n) / high_ramp)
        else       0

    The two sides are those of NV-Reason-CT's length band; low = 0 with high = L_max - L_cache and high_ramp = L_cache
    is DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13); high = None is NV-Reason-CXR's penalty for
    completions that are too short.

    Raises ValueError for fields out of range.
    """

    low: int = 0  #: tokens, >= 0; 0: no lower side
    high: int | None = None  #: tokens, >= low; None: no upper side
    low_ramp: int | None = None  #: tokens below `low` at which the penalty reaches -1; None: `low`
    high_ramp: int | None = None  #: tokens above `high` at which it reaches -1; needed with `high`

    def __post_init__(self) -> None:
        if self.low < 0 or (self.high is not None and self.high < self.low):
            raise ValueError(f"a band needs 0 <= low <= high, found low={self.low}, high={self.high}")
        if (self.high is None) != (self.high_ramp is None):
            raise ValueError(f"high and high_ramp go together, found high={self.high}, high_ramp={self.high_ramp}")
        for name, ramp in (("low_ramp", self.low_ramp), ("high_ramp", self.high_ramp)):
            if ramp is not None and ramp < 1:
                raise ValueError(f"{name} must be >= 1 token, found {ramp}")

    def score(self, tokens: int) -> float:
        """
        >>> LengthBand(low=100, high=200, high_ramp=50).score(225)
        -0.5
        """
        if tokens < 0:
            raise ValueError(f"completion_tokens must be >= 0, found {tokens}; give the length in tokens")
        if tokens < self.low:
            return max(-1.0, (tokens - self.low) / (self.low_ramp or self.low))
        if self.high is not None and self.high_ramp is not None and tokens > self.high:
            return max(-1.0, (self.high - tokens) / self.high_ramp)
        return 0.0

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], *, completion_tokens: Sequence[int], **columns: Any
    ) -> list[float | None]:
        del prompts, columns
        return [self.score(tokens) for _, tokens in aligned(completions, completion_tokens=completion_tokens)]
