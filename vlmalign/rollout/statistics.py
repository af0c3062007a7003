"""What a rollout computed beside what it was asked for: the shares of its work that went into padding."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass
class RolloutStats:
    """Counts, in tokens unless they say otherwise; they add up over the batches of a rollout."""

    prompts: int = 0  #: each computed once, whatever its number of completions
    completions: int = 0
    tokens: int = 0  #: of completions, stop tokens included
    decoded: int = 0  #: places that decoding computed: completions x steps, finished ones and empty rows included
    blocks: int = 0  #: calls of a decode program
    prompt_tokens: int = 0
    prompt_columns: int = 0  #: places that prefilling computed, padding included
    moves: int = 0  #: changes of the caches' shape

    def __add__(self, other: RolloutStats) -> RolloutStats:
        return RolloutStats(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    @property
    def decoded_per_token(self) -> float:
        """1 is ideal: no step was spent on a completion that had ended."""
        return self.decoded / max(self.tokens, 1)

    @property
    def columns_per_prompt_token(self) -> float:
        """1 is ideal: no prompt was padded."""
        return self.prompt_columns / max(self.prompt_tokens, 1)

    @property
    def decoded_used(self) -> float:
        """The share of decoded places that are tokens of completions."""
        return self.tokens / max(self.decoded, 1)

    @property
    def prefill_used(self) -> float:
        """The share of prefilled places that are tokens of prompts."""
        return self.prompt_tokens / max(self.prompt_columns, 1)
