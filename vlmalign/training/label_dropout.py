"""Label dropout: rewards are shown the true labels with a random share of them missing.

Which labels follows from (seed, round, prompt): all completions of a prompt are compared under one truth, a round that
comes again after a kill has the same, and the next pass over the data draws anew. Part of what a rater
names is convention; under dropout no label pays for certain.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmalign.rewards.runner import ScoredBatch
from vlmalign.training.rollouts import Score

#: tells these draws from others of the same seed
_PURPOSE = 4


def with_label_dropout(score: Score, share: float, *, seed: int) -> Score:
    """`score` with the column `truth` thinned out; `score` itself where the share is 0."""
    if share == 0:
        return score

    def thinned(
        number: int,
        keys: Sequence[tuple[int, int]],
        prompts: list[str],
        completions: list[str],
        columns: dict[str, list[Any]],
    ) -> ScoredBatch:
        truth = [
            None if labels is None else kept_labels(labels, share, key=(seed, number, prompt))
            for (prompt, _), labels in zip(keys, columns["truth"], strict=True)
        ]
        return score(number, keys, prompts, completions, {**columns, "truth": truth})

    return thinned


def kept_labels(labels: Sequence[str], share: float, *, key: tuple[int, int, int]) -> list[str]:
    """The labels that are left when each is dropped with probability `share`; all of them where none would be left, since
    an empty truth says that nothing is there.

    >>> kept_labels(["Edema"], 0.9, key=(0, 0, 0))
    ['Edema']
    """
    drawn = np.random.default_rng([_PURPOSE, *key]).random(len(labels))
    kept = [label for label, number in zip(labels, drawn, strict=True) if number >= share]
    return kept or list(labels)
