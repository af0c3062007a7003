"""The most likely of a prompt's sampled completions."""

from __future__ import annotations

from collections.abc import Sequence

from vlmalign.rollout.slots import Completion


def n_best(completions: Sequence[Completion], count: int, *, per_token: bool = False) -> list[Completion]:
    """At most `count` different completions, the most likely first; of equals the one sampled first.

    Likelihood is that of the whole completion at the sampling temperature, or with `per_token` its mean per token,
    which does not prefer short ones.

    Raises:
        ValueError: when `count` is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be >= 1, found {count}")
    different: dict[tuple[int, ...], Completion] = {}
    for completion in completions:
        different.setdefault(tuple(completion.tokens.tolist()), completion)

    def score(completion: Completion) -> float:
        total = float(completion.logp.sum(dtype="float64"))
        return total / max(len(completion.tokens), 1) if per_token else total

    return sorted(different.values(), key=score, reverse=True)[:count]
