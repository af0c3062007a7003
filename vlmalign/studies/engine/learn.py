"""The two ways of learning from given answers: supervised fine-tuning and preference optimisation."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from vlmalign import stopping
from vlmalign.studies.engine.objective import objective_of
from vlmalign.studies.engine.stage_config import Dpo, Sft
from vlmalign.studies.engine.states import REFERENCE
from vlmalign.studies.engine.validate import answers_loss, preferences, watching
from vlmalign.studies.engine.work import Work
from vlmalign.training.loop import Finished, train_states
from vlmalign.training.optimiser import build_optimiser
from vlmalign.training.preference import PreferenceSource, Recorded, precompute_reference
from vlmalign.training.step import Trainer
from vlmalign.training.supervised import Shapes, SupervisedSource


def run_sft(stage: Sft, work: Work) -> Finished:
    """Supervised fine-tuning."""
    base, shapes, train = work.base, work.shapes(stage), work.texts.train.items
    steps = stage.length(len(train))
    trainer = Trainer(
        work.model,
        objective_of(stage),
        build_optimiser(stage.optimiser.settings, steps),
        seed=work.seed,
        placement=base.devices.training_of(work.model),
    )
    source = SupervisedSource(train, batch=stage.batch, shapes=shapes, features=base.features, seed=work.seed)
    evaluate = None
    if work.texts.validation is not None:
        evaluate = watching(stage, work, answers_loss(trainer, work, shapes))
    return train_states(work.stretch(stage, steps), trainer, work.first(), work.frozen, source, work.progress, evaluate)


def run_dpo(stage: Dpo, work: Work) -> Finished:
    """Preference optimisation; the reference's log-probabilities are computed once and kept in the stage's folder."""
    base, shapes, train = work.base, work.shapes(stage), work.texts.train.items
    settings = stage.objective.settings()
    steps = stage.length(len(train))
    recorded = _score_reference(work, shapes) if settings.needs_reference else None
    trainer = Trainer(
        work.model,
        objective_of(stage),
        build_optimiser(stage.optimiser.settings, steps),
        seed=work.seed,
        placement=base.devices.training_of(work.model),
    )
    source = partial(PreferenceSource, shapes=shapes, features=base.features, seed=work.seed, reference=recorded)
    evaluate = None
    if work.texts.validation is not None:
        # One batch of all pairs, which is the same at every evaluation.
        held_out = source(work.texts.validation.items, batch=len(work.texts.validation.items))
        evaluate = watching(stage, work, preferences(trainer, work, held_out, settings))
    stretch = work.stretch(stage, steps, shown=("objective", "rewards/accuracies", "rewards/margins"))
    pairs = source(train, batch=stage.batch)
    return train_states(stretch, trainer, work.first(), work.frozen, pairs, work.progress, evaluate)


def _score_reference(work: Work, shapes: Shapes) -> Recorded:
    """Log-probabilities of every pair under the reference."""
    model, extra = work.base.reference(work.reference)
    train, validation = work.texts.train.items, work.texts.validation
    # Both sets have numbers of their own; here they must not be taken for each other.
    first = 1 + max(group.id for group in train)
    held_out = [] if validation is None else validation.items
    pairs = [*train, *(replace(group, id=first + i) for i, group in enumerate(held_out))]
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            work.progress.stage(f"{work.name} reference, pairs", total)
            begun = True
        stopping.check(f"{work.name}: the reference's log-probabilities so far are kept")
        work.progress.update(done)

    return precompute_reference(
        work.folder / REFERENCE,
        pairs,
        model=model,
        params={**work.frozen, **extra},
        temperature=1.0,
        shapes=shapes,
        features=work.base.features,
        pictures=work.base.front.pixels,
        mesh=work.base.devices.mesh,
        progress=advance,
    )
