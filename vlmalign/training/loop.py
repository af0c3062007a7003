"""The one loop for all objectives: a source makes optimiser batches, the trainer updates, files remember.

A stage's folder holds `metrics.jsonl` (one line per step) and `checkpoints/`, and where a best state is chosen `best/`.
Started again, a stage goes on from its newest checkpoint: parameters, optimiser, data position, the length of the
metrics file and the record of the best evaluation are restored together.

In a run of several processes all of them call `train` with the same arguments; the parameters live on a mesh of all
their devices, process 0 writes the metrics, and checkpoints are written by all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax

from vlmalign import stopping
from vlmalign.distributed import is_writer
from vlmalign.exchange import from_first
from vlmalign.log import EMPTY, MetricsWriter
from vlmalign.models.model import Params
from vlmalign.progress import Progress
from vlmalign.training.best import Best, BestSoFar
from vlmalign.training.checkpoints import Checkpoints
from vlmalign.training.guards import Guards
from vlmalign.training.step import MicroBatch, StepMetrics, Trainer


class Work(NamedTuple):
    """One optimiser batch, and what its making measured (rewards, lengths)."""

    batches: Sequence[MicroBatch]
    metrics: Mapping[str, float | None]
    options: Mapping[str, Any] = {}  #: of this step, for the objective's counts
    ids: Sequence[int] = ()  #: of its groups, written down where their gradient is not finite
    beside: Sequence[MicroBatch] = ()  #: of a second objective, whose gradient is added (`Trainer.step`)


@runtime_checkable
class Source(Protocol):
    """Makes optimiser batches: from data (SFT, DPO) or by rolling out the current policy (GRPO, PPO)."""

    #: `work` needs what the step before has learnt or measured. Where it does not, batches are made, and metrics
    #: written, while the device is at a step
    waits: bool

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
    check: Callable[[], None] = lambda: (
        None
    )  #: called in process 0 before anything is written; what it raises ends the stage
    rewards: tuple[str, ...] = ()  #: names of the rewards that are learnt from, for the guards
    max_skipped: int = 10  #: steps in a row whose gradient is not finite before the stage gives up


class Finished(NamedTuple):
    """The trained parameters that a stage ended with."""

    last: dict[str, jax.Array]
    best: dict[str, jax.Array] | None  #: of the best evaluation, where a rule chooses one
    step: int  #: updates done
    best_step: int | None  #: updates done when the best was found


def train(
    stage: Stage,
    trainer: Trainer,
    params: Params,
    frozen: Params,
    source: Source,
    progress: Progress,
    evaluate: Evaluate | None = None,
) -> dict[str, jax.Array]:
    """The trained parameters that `train_states` ends with: of the best evaluation where a rule chooses one."""
    found = train_states(stage, trainer, params, frozen, source, progress, evaluate)
    return found.last if found.best is None else found.best


def train_states(
    stage: Stage,
    trainer: Trainer,
    params: Params,
    frozen: Params,
    source: Source,
    progress: Progress,
    evaluate: Evaluate | None = None,
) -> Finished:
    """The trained parameters after `stage.steps` updates of `params`, continuing an interrupted stage.

    With `stage.best` training ends early once `patience` evaluations in a row were no better.

    Raises:
        ValueError: when the gradients of `stage.max_skipped` steps in a row are not finite. What was saved stands.
        Stopped: when the run was told to end; the step that it was at is done and saved.
    """
    if (evaluate is None) != (stage.evaluate_every == 0) or (stage.best is not None and evaluate is None):
        raise ValueError("evaluation needs a function and evaluate_every > 0; choosing the best needs evaluation")
    state = trainer.init(params)
    with (
        Checkpoints(stage.folder / "checkpoints", say=progress.say) as checkpoints,
        BestSoFar(stage.folder / "best", stage.best, progress.say) as best,
        MetricsWriter(stage.folder / "metrics.jsonl", writes=is_writer()) as writer,
    ):
        rule = stage.best
        guards = Guards(
            stage.name, progress.say, rule and rule.metric, rule is not None and rule.mode == "min", stage.rewards
        )
        restored = checkpoints.restore(state)
        skipped = 0
        if restored is None:
            writer.rewind(EMPTY)
            best.rewind(None)
        else:
            state = restored.state
            source.set_state(restored.position["source"])
            writer.rewind(restored.position["metrics"])
            best.rewind(restored.position["best"])
            skipped = restored.position["skipped"]

        start, unread = int(state.step), None
        if start < stage.steps and not best.exhausted:
            if start:
                progress.say(f"{stage.name}: continuing after update {start} of {stage.steps}")
            progress.stage(stage.name, stage.steps, start=start)
        for step in range(start, stage.steps):
            if best.exhausted:
                break
            if is_writer():
                stage.check()
            if unread is not None and source.waits:
                skipped = _read(unread, stage, source, writer, progress, guards, skipped)
                unread = None
            work = source.work(step, state.params)
            state, found = trainer.step(state, frozen, work.batches, work.options, work.beside)
            if unread is not None:
                skipped = _read(unread, stage, source, writer, progress, guards, skipped)
            unread, done = _Unread(step, found, work.metrics, work.ids), step + 1
            due = done % stage.checkpoint_every == 0 or done == stage.steps
            measured: dict[str, Any] = {}
            if evaluated := evaluate is not None and (done % stage.evaluate_every == 0 or done == stage.steps):
                # What decides about the best and the end must be the same number everywhere, to the last bit.
                measured = from_first(lambda found=evaluate(done, state.params): dict(found))
                from_first(stage.check)
                best.see(done, measured, state)
            if evaluated or due:
                skipped = _read(unread, stage, source, writer, progress, guards, skipped, measured)
                unread = None
            stop = stopping.requested() and done < stage.steps and not best.exhausted
            if stop and unread is not None:
                skipped = _read(unread, stage, source, writer, progress, guards, skipped)
                unread = None
            if due or best.exhausted or stop:
                from_first(stage.check)
                checkpoints.save(
                    state,
                    {
                        "source": source.get_state(),
                        "metrics": writer.position(),
                        "best": asdict(best.record),
                        "skipped": skipped,
                    },
                )
            if stop:
                raise stopping.Stopped(f"{stage.name} was saved after update {done} of {stage.steps}")
        return Finished(state.params, best.params(state), int(state.step), best.record.step)


class _Unread(NamedTuple):
    """A step that the device may still be at."""

    step: int  #: from 0
    found: StepMetrics
    metrics: Mapping[str, float | None]  #: of its batch
    ids: Sequence[int]  #: of its groups


def _read(
    unread: _Unread,
    stage: Stage,
    source: Source,
    writer: MetricsWriter,
    progress: Progress,
    guards: Guards,
    skipped: int,
    measured: Mapping[str, Any] = {},
) -> int:
    """Write the line of a step, once the device has finished it; how many steps in a row were skipped, so far."""
    line = _line(unread, stage) | measured
    source.observe(line)
    writer.write(line)
    guards.see(line)
    progress.update(line["step"], **{k: line[k] for k in stage.shown if line.get(k) is not None})
    skipped = skipped + 1 if line["skipped"] else 0
    if skipped >= stage.max_skipped:
        raise ValueError(
            f"stage {stage.name}: the gradients of {skipped} steps in a row up to step {line['step']} were not finite, so "
            "nothing was learnt from them; lower the learning rate or look for broken examples "
            f"({stage.folder / 'metrics.jsonl'})"
        )
    return skipped


def _line(unread: _Unread, stage: Stage) -> dict[str, Any]:
    """One line of metrics: sums divided by their counts, once."""
    host = jax.device_get(unread.found)
    parts = {name: float(total) / float(count) if count else None for name, (total, count) in host.parts.items()}
    return {
        "step": unread.step + 1,
        **unread.metrics,
        "objective": float(host.loss),
        **parts,
        **{name: float(value) for name, value in host.maxima.items()},
        "grad_norm": float(host.grad_norm),
        "skipped": int(host.skipped),
        "learning_rate": float(stage.learning_rate(unread.step)),
        **({"groups": sorted(unread.ids)} if host.skipped else {}),
    }
