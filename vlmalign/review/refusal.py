"""A request that is refused: what a reader is told, and the status of the answer."""

from __future__ import annotations


class Refused(ValueError):
    """Raised with a sentence for the reader; `status` is that of the HTTP answer."""

    def __init__(self, sentence: str, status: int = 409):
        super().__init__(sentence)
        self.status = status
