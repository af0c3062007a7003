"""Every completion of a stage with its rewards, as JSON Lines: what `vlmalign report` makes browsable step by step.

A line holds the text of the completion and of its prompt, and the columns that rewards were given; images are named by their keys, never copied. The file
stays inside the run folder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
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

    def __init__(self, path: Path, run: Path | None = None):
        """Images that lie in `run`, the run's folder, are named relative to it, so that the folder can be moved."""
        self._writer = MetricsWriter(path, writes=is_writer())
        self._run = None if run is None else run.resolve()

    def write(self, step: int, rollouts: Sequence[Rollout], advantages: np.ndarray) -> None:
        """The completions that optimiser step `step` (from 1) learnt from; `advantages` is [groups, K]."""
        for rollout, row in zip(rollouts, advantages, strict=True):
            for sample, (completion, text) in enumerate(zip(rollout.completions, rollout.texts, strict=True)):
                self._writer.write(
                    {
                        "step": step,
                        "prompt_id": rollout.task.prompt.id,
                        "sample": sample,
                        "images": [self._name(key) for key in rollout.task.prompt.images],
                        "prompt": rollout.task.text,
                        "columns": dict(rollout.task.columns),
                        "completion": text,
                        "tokens": len(completion.tokens),
                        "stopped": completion.stopped,
                        "reward": _known(rollout.rewards[sample]),
                        "parts": {name: _known(values[sample]) for name, values in rollout.parts.items()},
                        "advantage": float(row[sample]),
                    }
                )

    def _name(self, key: str) -> str:
        path = Path(key)
        inside = self._run is not None and path.is_relative_to(self._run)
        return path.relative_to(self._run).as_posix() if inside else key

    def position(self) -> Position:
        return self._writer.position()

    def rewind(self, position: Sequence[Any]) -> None:
        self._writer.rewind(position)

    def close(self) -> None:
        self._writer.close()


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
