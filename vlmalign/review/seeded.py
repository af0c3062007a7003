"""Chance that follows from a seed and from what it is for: the same on every machine, and free of names of arms."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from random import Random
from typing import Any, TypeVar

Item = TypeVar("Item")


def digest(*parts: Any) -> str:
    """SHA-256 of JSON values, as 64 hexadecimal digits.

    >>> digest(1, "order")[:8]
    '5911b532'
    """
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    # Half a surrogate pair can stand in a model's text; UTF-8 has no bytes for it.
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).hexdigest()


def generator(*parts: Any) -> Random:
    """A generator of its own for what `parts` name."""
    return Random(int(digest(*parts), 16))


def shuffled(items: Iterable[Item], *parts: Any) -> list[Item]:
    """The items in an order that follows from `parts` and from their own content, not from the order they come in."""
    return sorted(items, key=lambda item: digest(*parts, item))
