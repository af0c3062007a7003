"""Stop strings: where in a completion's tokens its text first holds one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlmalign.shapes import Int


def first_stop(
    tokens: Int[np.ndarray, "length"], stop: Sequence[str], decode: Callable[[np.ndarray], str], *, known: int = 0
) -> int | None:
    """The least number of leading tokens whose text holds one of `stop`; None: none does.

    The first `known` tokens are known to hold none. Text is decoded from the beginning: what a token reads as depends
    on those before it, and a stop string may begin in any of them.

    >>> first_stop(np.array([104, 105, 33, 33]), ("!",), lambda tokens: "".join(map(chr, tokens)))
    3
    """

    def holds(count: int) -> bool:
        text = decode(tokens[:count])
        return any(term in text for term in stop)

    if not holds(len(tokens)):
        return None
    return next(count for count in range(known + 1, len(tokens) + 1) if holds(count))
