"""Tokens of an answer as they come -> text for a terminal: each character once, and none that steers the terminal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from vlmalign.reporting.visible_text import plain

#: what a tokenizer writes for bytes that are no whole character
BROKEN = "\ufffd"


class TextStream:
    """Writes what is new in a growing text.

    `decode` gives the text of the tokens so far, `write` takes what is new of it. Bytes at the end that are no whole
    character yet wait for the tokens that complete it.
    """

    def __init__(self, decode: Callable[[np.ndarray], str], write: Callable[[str], None]):
        self._decode, self._write = decode, write
        self._written = 0  # characters of the text

    def show(self, tokens: np.ndarray) -> None:
        """The answer goes on, and is these tokens so far."""
        self._up_to(self._decode(tokens).rstrip(BROKEN))

    def end(self, tokens: np.ndarray) -> None:
        """These are the answer's tokens: what waited is written as it is, and a line break."""
        self._up_to(self._decode(tokens))
        self._write("\n")

    def _up_to(self, text: str) -> None:
        if len(text) > self._written:
            self._write(plain(text[self._written :]))
            self._written = len(text)
