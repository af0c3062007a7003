"""A completion with think and solution block, read with a schema's names alone; tasks read with their own reader."""

from __future__ import annotations

from vlmalign.tasks.label_reader import LabelReader, Parsed


def parse_completion(text: str, labels: tuple[str, ...]) -> Parsed:
    """What `text` predicts among `labels` (see `LabelReader.read`)."""
    return LabelReader(labels).read(text)
