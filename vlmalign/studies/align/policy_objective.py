"""The loss of a GRPO or PPO stage, as its section of the config states it."""

from __future__ import annotations

from functools import partial

from vlmalign.objectives.grpo import grpo_counts, grpo_loss
from vlmalign.objectives.ppo import ppo_counts, ppo_loss
from vlmalign.studies.align.policy_config import Grpo, Ppo
from vlmalign.training.step import Objective


def objective_of(stage: Grpo | Ppo) -> Objective:
    """The stage's loss, at the temperature that completions are sampled at."""
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
