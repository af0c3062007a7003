"""Every completion of a stage with its rewards, as JSON Lines: what `vlmalign report` makes browsable step by step.

A line holds the text of the completion and of its prompt, and the columns that rewards were given; images are named by their keys, never copied. The file
stays inside the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlmalign.distributed import is_writer
from vlmalign.log import MetricsWriter, Position
from vlmalign.training.rollouts import Rollout


class CompletionLog:
    """Appends to `path`; `position` and `rewind` let a continued run go on without a line missing or doubled.

    Every process of a run holds all completions; process 0 writes them.
    """

    def __init__(self, path: Path, name: Callable[[str], str] = str):
        """`name` gives the path of an image the name that it has in the log."""
        self._writer = MetricsWriter(path, writes=is_writer())
        self._name = name

    def write(self, step: int, rollouts: Sequence[Rollout], advantages: np.ndarray) -> None:
        """The completions that optimiser step `step` (from 1) learnt from; `advantages` is [groups, K]."""
        for rollout, row in zip(rollouts, advantages, strict=True):
            images, columns = rollout.task.prompt.images, rollout.task.columns
            for sample, (completion, text) in enumerate(zip(rollout.completions, rollout.texts, strict=True)):
                self._writer.write(
                    {
                        "step": step,
                        "prompt_id": rollout.task.prompt.id,
                        "sample": sample,
                        "images": [self._name(key) for key in images],
                        "prompt": rollout.task.text,
                        "columns": {key: self._without_paths(value, images) for key, value in columns.items()},
                        "completion": text,
                        "tokens": len(completion.tokens),
                        "stopped": completion.stopped,
                        "reward": _known(rollout.rewards[sample]),
                        "parts": {name: _known(values[sample]) for name, values in rollout.parts.items()},
                        "advantage": float(row[sample]),
                    }
                )

    def _without_paths(self, value: Any, images: Sequence[str]) -> Any:
        """A column's value, in which the prompt's images have their names too."""
        if isinstance(value, list):
            return [self._without_paths(each, images) for each in value]
        return self._name(value) if isinstance(value, str) and value in images else value

    def position(self) -> Position:
        return self._writer.position()

    def rewind(self, position: Sequence[Any]) -> None:
        self._writer.rewind(position)

    def close(self) -> None:
        self._writer.close()


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
