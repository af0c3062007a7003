"""The loss of a stage that trains, as its section of the config states it."""

from __future__ import annotations

from functools import partial

from vlmalign.objectives.grpo import grpo_counts, grpo_loss
from vlmalign.objectives.ppo import ppo_counts, ppo_loss
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.studies.engine.stage_config import Dpo, Grpo, Ppo, Sft, SftBeside, Trains
from vlmalign.training.preference import preference_objective
from vlmalign.training.step import Objective
from vlmalign.types import GroupBatch, LossParts, Scores

#: before the names of the numbers of an SFT loss beside a policy's
BESIDE = "sft"


def objective_of(stage: Trains) -> Objective:
    """The stage's loss; of GRPO and PPO at the temperature that completions are sampled at."""
    if isinstance(stage, Sft):
        return Objective("sft", partial(sft_loss, kind=stage.loss), partial(sft_counts, kind=stage.loss), dropout=True)
    if isinstance(stage, Dpo):
        # The reference's log-probabilities are computed once, before training.
        settings = stage.objective.settings()
        return preference_objective(settings, recorded=settings.needs_reference)
    if isinstance(stage, Grpo):
        settings = stage.objective.settings(stage.rollout.completion)
        loss, counts = partial(grpo_loss, settings=settings), partial(grpo_counts, settings=settings)
    else:
        settings = stage.objective.settings()
        loss, counts = partial(ppo_loss, settings=settings), partial(ppo_counts, settings=settings)
    return Objective(
        stage.kind,
        loss,
        counts,
        temperature=stage.rollout.temperature,
        needs_reference=settings.beta > 0,
        needs_values=isinstance(stage, Ppo),
    )


def objective_beside(mix: SftBeside) -> Objective:
    """The SFT loss beside a policy's, whose numbers are called "sft/NAME". Its weight is part of what divides it."""

    def loss(scores: Scores, batch: GroupBatch) -> LossParts:
        found = sft_loss(scores, batch)
        return found._replace(metrics={f"{BESIDE}/{name}": value for name, value in found.metrics.items()})

    def counts(batches: list[GroupBatch]) -> dict[str, float]:
        return {name: count / mix.weight for name, count in sft_counts(batches).items()}

    return Objective(BESIDE, loss, counts, dropout=True)
