"""Constraints on an answer that can be checked: JSON, bullets, number of words, forbidden words.

{"kind": "json"}                                 nothing but one JSON value
{"kind": "bullets", "low": 3, "high": 5}         lines that begin with `-` or `*`
{"kind": "words", "high": 100}                   separated by white space
{"kind": "forbidden", "words": ["cure"]}         whole words, without regard to case
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from vlmalign.quoting import quoted, shown
from vlmalign.tasks.json_text import read_json

_BULLET = re.compile(r"^[ \t]*[-*][ \t]+\S", re.MULTILINE)


def _is_json(text: str) -> bool:
    try:
        read_json(text)
    except ValueError:
        return False
    return True


def _within(count: int, low: float, high: float) -> bool:
    return low <= count <= high


def _lacks(text: str, words: Sequence[str]) -> bool:
    # Of one text the letters would be forbidden one by one.
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise TypeError("words must be a list of words")
    low = text.casefold()
    return not any(re.search(rf"(?<!\w){re.escape(word.casefold())}(?!\w)", low) for word in words)


#: kind -> whether a text satisfies it; the other keys of the constraint are the arguments
CHECKS: Mapping[str, Callable[..., bool]] = MappingProxyType(
    {
        "json": lambda text: _is_json(text),
        "bullets": lambda text, low=1, high=float("inf"): _within(len(_BULLET.findall(text)), low, high),
        "words": lambda text, low=0, high=float("inf"): _within(len(text.split()), low, high),
        "forbidden": lambda text, words: _lacks(text, words),
    }
)


def satisfied(text: str, constraint: Mapping[str, Any]) -> bool:
    """Whether an answer satisfies one constraint. Raises ValueError for another kind or other arguments.

    >>> satisfied("- one\\n- two", {"kind": "bullets", "low": 2})
    True
    """
    arguments = dict(constraint)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in CHECKS:
        raise ValueError(f"a constraint's kind must be one of {sorted(CHECKS)}, found {quoted(kind)}")
    try:
        return CHECKS[kind](text, **arguments)
    except TypeError as error:
        raise ValueError(f"constraint {quoted(dict(constraint))} has the wrong arguments: {shown(error)}") from error
