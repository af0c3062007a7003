"""Dynamic sampling: whether to sample again because groups came back with nothing to compare (DAPO, arXiv 2503.14476, eq. 11).

A group whose completions all have the same reward has advantage 0 and teaches nothing. The decision is pure: the
caller samples, keeps what it is told to keep, and asks again until `stop`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Bool


class Decision(NamedTuple):
    """What to do with the groups sampled so far; indices are into them."""

    keep: tuple[int, ...]  #: groups of the optimiser batch, informative ones first, in the order they were sampled
    resample: tuple[int, ...]  #: flat groups whose prompts to sample again or to replace; empty when `stop`
    stop: bool  #: the batch is final
    informative: int  #: groups in `keep` whose rewards differ


def decide(flat: Bool[np.ndarray, "groups"], *, wanted: int, attempt: int, attempts: int) -> Decision:
    """After `attempt` (from 1) of at most `attempts` rounds of sampling, with `flat` of every group sampled so far.

    Stops when `wanted` groups differ within, or when the attempts are used up; then flat groups fill the batch, so
    that its size, and with it the divisor of the loss, stays the same.

    >>> decide(np.array([True, False, True]), wanted=2, attempt=1, attempts=3)
    Decision(keep=(1,), resample=(0,), stop=False, informative=1)
    """
    if wanted < 1 or attempts < 1 or not 1 <= attempt <= attempts:
        raise ValueError(
            "dynamic sampling needs wanted >= 1 and 1 <= attempt <= attempts; "
            f"found wanted {wanted}, attempt {attempt}, attempts {attempts}"
        )
    flat = np.asarray(flat, bool)
    good, rest = np.flatnonzero(~flat).tolist(), np.flatnonzero(flat).tolist()
    keep, missing = good[:wanted], max(0, wanted - len(good))
    stop = missing == 0 or attempt == attempts
    if stop:
        return Decision((*keep, *rest[:missing]), (), True, len(keep))
    return Decision(tuple(keep), tuple(rest[:missing]), False, len(keep))


def soft_overlong_penalty(lengths: np.ndarray, *, longest: int, buffer: int) -> np.ndarray:
    """A reward in [-1, 0] for each length in tokens: 0 up to `longest` - `buffer`, then linear down to -1 at `longest`.

    DAPO, arXiv 2503.14476, eq. 13: L_max = `longest`, L_cache = `buffer`. Lengths are tokens, never characters.

    >>> soft_overlong_penalty(np.array([80, 90, 100, 120]), longest=100, buffer=20).tolist()
    [0.0, -0.5, -1.0, -1.0]
    """
    if not 0 < buffer <= longest:
        raise ValueError(f"the overlong penalty needs 0 < buffer <= longest, found buffer {buffer}, longest {longest}")
    found = np.clip((longest - buffer - np.asarray(lengths, np.float64)) / buffer, -1.0, 0.0)
    return found + 0.0  # -0.0 -> 0.0
