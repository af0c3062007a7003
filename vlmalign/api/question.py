"""A question as the conversation that a chat template writes out."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any


def question(
    text: str, *, images: Sequence[str | PathLike[str]] = (), system: str | None = None
) -> list[dict[str, Any]]:
    """The conversation of one user's turn: the images, then `text`; with `system`, a system turn before it.

    >>> question("Is the heart large?", system="Answer in one word.")
    ... # doctest: +NORMALIZE_WHITESPACE
    [{'role': 'system', 'content': 'Answer in one word.'},
     {'role': 'user', 'content': 'Is the heart large?'}]
    """
    content: Any = text
    if images:
        shown = [{"type": "image", "image": str(Path(image).absolute())} for image in images]
        content = [*shown, {"type": "text", "text": text}]
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": content}]
