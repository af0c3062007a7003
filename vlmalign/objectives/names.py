"""Options that are given by name: an unknown one is refused with the nearest known one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def require_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError, naming what is known and what is nearest, unless `name` is known.

    >>> require_known("loss", "dappo", ("grpo", "dapo"))
    Traceback (most recent call last):
        ...
    ValueError: loss must be one of grpo, dapo; found 'dappo', did you mean dapo?
    """
    known = list(known)
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
        hint = f", did you mean {near[0]}?" if near else ""
        raise ValueError(f"{what} must be one of {', '.join(known)}; found {name!r}{hint}")
