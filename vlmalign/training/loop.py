"""The one loop for all objectives: a source makes optimiser batches, the trainer updates, files remember.

A stage's folder holds `metrics.jsonl` (one line per step) and `checkpoints/`. Started again, a stage goes on from its
newest checkpoint: parameters, optimiser, data position and the length of the metrics file are restored together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

from vlmalign.log import MetricsWriter
from vlmalign.models.model import Params
from vlmalign.progress import Progress
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.step import MicroBatch, Trainer


class Work(NamedTuple):
    """One optimiser batch, and what its making measured (rewards, lengths)."""

    batches: Sequence[MicroBatch]
    metrics: Mapping[str, float | None]


@runtime_checkable
class Source(Protocol):
    """Makes optimiser batches: from data (SFT, DPO) or by rolling out the current policy (GRPO, PPO)."""

    def work(self, step: int, params: Params) -> Work:
        """The batch of update number `step` (from 0) under the trained parameters `params`."""
        ...

    def get_state(self) -> dict[str, Any]:
        """JSON: where the source stands."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to where `get_state` said."""
        ...


@dataclass(frozen=True)
class Stage:
    """A stretch of training: its name, its folder, how long, and how often it is saved."""

    name: str
    folder: Path
    steps: int
    checkpoint_every: int  #: steps; the last step is always saved
    learning_rate: optax.Schedule
    shown: tuple[str, ...] = ("loss",)  #: metrics in the progress line


def train(
    stage: Stage, trainer: Trainer, params: Params, frozen: Params, source: Source, progress: Progress
) -> dict[str, jax.Array]:
    """The trained parameters after `stage.steps` updates of `params`, continuing an interrupted stage."""
    state = trainer.init(params)
    with (
        Checkpoints(stage.folder / "checkpoints") as checkpoints,
        MetricsWriter(stage.folder / "metrics.jsonl") as writer,
    ):
        restored = checkpoints.restore(state)
        if restored is None:
            writer.rewind(0)
        else:
            state = restored.state
            source.set_state(restored.position["source"])
            writer.rewind(restored.position["metrics"])
        start = int(state.step)
        if start < stage.steps:
            progress.stage(stage.name, stage.steps, start=start)
        for step in range(start, stage.steps):
            work = source.work(step, state.params)
            state, found = trainer.step(state, frozen, work.batches)
            line = _line(step, found, work, stage)
            writer.write(line)
            progress.update(step + 1, **{k: line[k] for k in stage.shown if line.get(k) is not None})
            if (step + 1) % stage.checkpoint_every == 0 or step + 1 == stage.steps:
                checkpoints.save(state, {"source": source.get_state(), "metrics": writer.position()})
    return state.params


def _line(step: int, found: Any, work: Work, stage: Stage) -> dict[str, Any]:
    """One line of metrics: sums divided by their counts, once."""
    host = jax.device_get(found)
    parts = {name: float(total / count) if count else None for name, (total, count) in host.parts.items()}
    return {
        "step": step + 1,
        **work.metrics,
        "objective": float(host.loss),
        **parts,
        "grad_norm": float(host.grad_norm),
        "learning_rate": float(stage.learning_rate(step)),
    }
