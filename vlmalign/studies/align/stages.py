"""What the stages share, and the two that learn from given answers: supervised fine-tuning and preferences."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from vlmalign.mesh import row_shares
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.progress import Progress
from vlmalign.shapes import Array
from vlmalign.studies.align.config import AlignConfig, AnyStage
from vlmalign.studies.align.prepare import StageData
from vlmalign.studies.align.stage_config import Dpo, Sft, Stage
from vlmalign.studies.align.system import System, Trained
from vlmalign.studies.align.validate import answers_loss, preferences
from vlmalign.training.best import Best
from vlmalign.training.loop import Stage as Stretch
from vlmalign.training.loop import train
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser, learning_rate
from vlmalign.training.preference import PreferenceSource, Recorded, precompute_reference, preference_objective
from vlmalign.training.step import Objective, Trainer
from vlmalign.training.supervised import Shapes, SupervisedSource


@dataclass(frozen=True)
class Work:
    """What a stage is run with, beside its own settings."""

    system: System
    data: StageData
    folder: Path
    seed: int  #: the stage's own
    progress: Progress

    def shapes(self, stage: Stage) -> Shapes:
        shares = row_shares(self.system.devices.mesh)
        return Shapes(**stage.shapes.model_dump(), images=self.data.images, shares=shares)


def stage_seed(config: AlignConfig, index: int) -> int:
    """A stage's own seed: two stages on the same prompts must not draw the same completions."""
    return int(np.random.SeedSequence([config.seed, index]).generate_state(1)[0] >> 1)


def optimiser_of(stage: Stage) -> OptimiserSettings:
    return OptimiserSettings(**stage.optimiser.model_dump())


def stretch(stage: AnyStage, work: Work, steps: int, *, shown: tuple[str, ...] = ("loss",)) -> Stretch:
    """The stage as the loop takes it."""
    validation = stage.validation
    best = None
    if validation is not None and validation.best is not None:
        mode = "min" if validation.best == "loss" else "max"
        best = Best(f"validation/{validation.best}", mode, validation.patience)
    return Stretch(
        work.folder.name,
        work.folder,
        steps,
        stage.checkpoint_every,
        learning_rate(optimiser_of(stage), steps),
        shown=shown,
        evaluate_every=0 if validation is None else validation.every,
        best=best,
    )


def run_sft(stage: Sft, work: Work, start: Trained) -> dict[str, Array]:
    """The trained parameters after supervised fine-tuning."""
    system, shapes = work.system, work.shapes(stage)
    steps = stage.length(len(work.data.train))
    trainer = Trainer(
        system.model,
        Objective("sft", partial(sft_loss, kind=stage.loss), partial(sft_counts, kind=stage.loss), dropout=True),
        build_optimiser(optimiser_of(stage), steps),
        seed=work.seed,
        placement=system.devices.training,
    )
    source = SupervisedSource(
        work.data.train, batch=stage.batch, shapes=shapes, features=system.features, seed=work.seed
    )
    evaluate = None
    if stage.validation is not None:
        evaluate = answers_loss(trainer, system, work.data.validation, shapes)
    plan = stretch(stage, work, steps)
    return train(plan, trainer, start.params, system.frozen, source, work.progress, evaluate)


def run_dpo(stage: Dpo, work: Work, start: Trained) -> dict[str, Array]:
    """The trained parameters after preference optimisation from `start`, which is also the reference."""
    system, shapes = work.system, work.shapes(stage)
    settings = stage.objective.settings()
    steps = stage.length(len(work.data.train))
    recorded = _score_reference(work, start, shapes) if settings.needs_reference else None
    trainer = Trainer(
        system.model,
        preference_objective(settings, recorded=recorded is not None),
        build_optimiser(optimiser_of(stage), steps),
        seed=work.seed,
        placement=system.devices.training,
    )
    source = partial(PreferenceSource, shapes=shapes, features=system.features, seed=work.seed, reference=recorded)
    evaluate = None
    if stage.validation is not None:
        # One batch of all pairs, which is the same at every evaluation.
        held_out = source(work.data.validation, batch=len(work.data.validation))
        evaluate = preferences(trainer, system, held_out, settings)
    plan = stretch(stage, work, steps, shown=("objective", "rewards/accuracies", "rewards/margins"))
    pairs = source(work.data.train, batch=stage.batch)
    return train(plan, trainer, start.params, system.frozen, pairs, work.progress, evaluate)


def _score_reference(work: Work, start: Trained, shapes: Shapes) -> Recorded:
    """Log-probabilities of every pair under `start`, computed once and kept in the stage's folder."""
    model, extra = work.system.reference(start)
    train, held_out = work.data.train, work.data.validation
    # Both sets are numbered by line; here they must not be taken for each other.
    first = 1 + max(group.id for group in train)
    pairs = [*train, *(replace(group, id=first + i) for i, group in enumerate(held_out))]
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            work.progress.stage(f"{work.folder.name} reference, pairs", total)
            begun = True
        work.progress.update(done)

    return precompute_reference(
        work.folder / "reference",
        pairs,
        model=model,
        params={**work.system.frozen, **extra},
        temperature=1.0,
        shapes=shapes,
        features=work.system.features,
        pictures=work.system.front.pixels,
        mesh=work.system.devices.mesh,
        progress=advance,
    )
