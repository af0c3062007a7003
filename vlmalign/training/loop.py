"""The one loop for all objectives: a source makes optimiser batches, the trainer updates, files remember.

A stage's folder holds `metrics.jsonl` (one line per step) and `checkpoints/`, and where a best state is chosen `best/`.
Started again, a stage goes on from its newest checkpoint: parameters, optimiser, data position, the length of the
metrics file and the record of the best evaluation are restored together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

from vlmalign.log import MetricsWriter
from vlmalign.models.model import Params
from vlmalign.progress import Progress
from vlmalign.training.best import Best, BestSoFar
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.step import MicroBatch, StepMetrics, Trainer


class Work(NamedTuple):
    """One optimiser batch, and what its making measured (rewards, lengths)."""

    batches: Sequence[MicroBatch]
    metrics: Mapping[str, float | None]
    options: Mapping[str, Any] = {}  #: of this step, for the objective's counts


@runtime_checkable
class Source(Protocol):
    """Makes optimiser batches: from data (SFT, DPO) or by rolling out the current policy (GRPO, PPO)."""

    def work(self, step: int, params: Params) -> Work:
        """The batch of update number `step` (from 0) under the trained parameters `params`."""
        ...

    def observe(self, line: Mapping[str, Any]) -> None:
        """What the step that was just made measured."""
        ...

    def get_state(self) -> dict[str, Any]:
        """JSON: where the source stands."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to where `get_state` said."""
        ...


#: (updates done, trained parameters) -> named numbers, such as "validation/loss"; None where there is nothing to measure
Evaluate = Callable[[int, Params], Mapping[str, float | None]]


@dataclass(frozen=True)
class Stage:
    """A stretch of training: its name, its folder, how long, and how often it is saved and evaluated."""

    name: str
    folder: Path
    steps: int
    checkpoint_every: int  #: steps; the last step is always saved
    learning_rate: optax.Schedule
    shown: tuple[str, ...] = ("loss",)  #: metrics in the progress line
    evaluate_every: int = 0  #: steps; 0: never. The last step is evaluated as well
    best: Best | None = None  #: keep the parameters of the best evaluation, and stop when there is none better
    max_skipped: int = 10  #: steps in a row whose gradient is not finite before the stage gives up


def train(
    stage: Stage,
    trainer: Trainer,
    params: Params,
    frozen: Params,
    source: Source,
    progress: Progress,
    evaluate: Evaluate | None = None,
) -> dict[str, jax.Array]:
    """The trained parameters after `stage.steps` updates of `params`, continuing an interrupted stage.

    With `stage.best`, those of the best evaluation; training ends early once `patience` evaluations in a row were no
    better.

    Raises:
        ValueError: when the gradients of `stage.max_skipped` steps in a row are not finite. What was saved stands.
    """
    if (evaluate is None) != (stage.evaluate_every == 0) or (stage.best is not None and evaluate is None):
        raise ValueError("evaluation needs a function and evaluate_every > 0; choosing the best needs evaluation")
    state = trainer.init(params)
    with (
        Checkpoints(stage.folder / "checkpoints") as checkpoints,
        BestSoFar(stage.folder / "best", stage.best) as best,
        MetricsWriter(stage.folder / "metrics.jsonl") as writer,
    ):
        restored = checkpoints.restore(state)
        skipped = 0
        if restored is None:
            writer.rewind(0)
            best.rewind(None)
        else:
            state = restored.state
            source.set_state(restored.position["source"])
            writer.rewind(restored.position["metrics"])
            best.rewind(restored.position["best"])
            skipped = restored.position["skipped"]
        start = int(state.step)
        if start < stage.steps and not best.exhausted:
            progress.stage(stage.name, stage.steps, start=start)
        for step in range(start, stage.steps):
            if best.exhausted:
                break
            work = source.work(step, state.params)
            state, found = trainer.step(state, frozen, work.batches, work.options)
            line = _line(step, found, work, stage)
            source.observe(line)
            skipped = skipped + 1 if line["skipped"] else 0
            done = step + 1
            if evaluate is not None and (done % stage.evaluate_every == 0 or done == stage.steps):
                line |= evaluate(done, state.params)
                best.see(done, line, state)
            writer.write(line)
            progress.update(done, **{k: line[k] for k in stage.shown if line.get(k) is not None})
            if skipped >= stage.max_skipped:
                raise ValueError(
                    f"stage {stage.name}: the gradients of {skipped} steps in a row up to step {done} were not finite, "
                    "so nothing was learnt from them; lower the learning rate or look for broken examples "
                    f"({stage.folder / 'metrics.jsonl'})"
                )
            if done % stage.checkpoint_every == 0 or done == stage.steps or best.exhausted:
                checkpoints.save(
                    state,
                    {
                        "source": source.get_state(),
                        "metrics": writer.position(),
                        "best": asdict(best.record),
                        "skipped": skipped,
                    },
                )
        return best.params(state)


def _line(step: int, found: StepMetrics, work: Work, stage: Stage) -> dict[str, Any]:
    """One line of metrics: sums divided by their counts, once."""
    host = jax.device_get(found)
    parts = {name: float(total) / float(count) if count else None for name, (total, count) in host.parts.items()}
    return {
        "step": step + 1,
        **work.metrics,
        "objective": float(host.loss),
        **parts,
        **{name: float(value) for name, value in host.maxima.items()},
        "grad_norm": float(host.grad_norm),
        "skipped": int(host.skipped),
        "learning_rate": float(stage.learning_rate(step)),
    }
