"""What is measured on held-out rows while a stage trains: loss of answers, preferences, rewards of greedy answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from vlmalign.mesh import Placement
from vlmalign.models.model import Params
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.randomness import key_for
from vlmalign.rewards.outcomes import OutcomeFile, score_or_replay
from vlmalign.rewards.runner import RewardRunner
from vlmalign.rollout.completions import Generator
from vlmalign.studies.align.system import System
from vlmalign.training.loop import Evaluate
from vlmalign.training.merged import merge_program
from vlmalign.training.preference import PreferenceSource
from vlmalign.training.rollouts import Task
from vlmalign.training.shared_rollouts import Answer, share_out
from vlmalign.training.step import MicroBatch, Trainer
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.types import Group


def answers_loss(trainer: Trainer, system: System, groups: Sequence[Group], shapes: Shapes) -> Evaluate:
    """ "validation/loss": mean negative log-likelihood of the answers' tokens, nat; "validation/n": conversations."""

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        del step
        batches = [MicroBatch(batch, {}) for batch in micro_batches(groups, shapes, system.features)]
        total, count = trainer.evaluate(params, system.frozen, batches)["loss"]
        return {"validation/loss": float(total) / float(count), "validation/n": len(groups)}

    return evaluate


def preferences(trainer: Trainer, system: System, held_out: PreferenceSource, settings: DpoSettings) -> Evaluate:
    """The objective ("validation/loss"), the share of pairs whose chosen answer has the higher reward
    ("validation/accuracy"), the mean margin of rewards, and the number of pairs; `held_out` gives all of them at once."""

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        found = trainer.evaluate(params, system.frozen, held_out.work(step, params).batches)
        mean = {name: float(total) / float(count) for name, (total, count) in found.items()}
        return {
            "validation/loss": sum(weight * mean[f"loss/{name}"] for name, weight in settings.weights.items()),
            "validation/accuracy": mean["rewards/accuracies"],
            "validation/margin": mean["rewards/margins"],
            "validation/n": int(found["rewards/accuracies"][1]),
        }

    return evaluate


def greedy_rewards(
    trainer: Trainer,
    system: System,
    tasks: Sequence[Task],
    generator: Generator,
    where: Placement | None,
    runner: RewardRunner,
    outcomes: OutcomeFile,
) -> Evaluate:
    """Mean reward of one greedy answer per prompt with its standard error, "validation/reward" and "..._se"; the mean of
    each reward by itself; lengths; and how many answers could be scored ("validation/n").

    Rewards with memory judge by what they remember of training, and do not remember these answers. Rewards are kept in
    `outcomes`: a continued run reads them there. `where` is what `generator` reads its parameters from.
    """
    merge = merge_program(trainer.model, trainer.mesh, generator.mesh)
    columns = {name: [task.columns[name] for task in tasks] for name in tasks[0].columns}

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        # Greedy: no draw depends on the key.
        policy = system.devices.bring(merge(system.frozen, params), where)
        rows = share_out([task.prompt for task in tasks], partial(_answer, system, generator, policy))
        answers = [answer.completion for (answer,) in rows]
        ids = [answer.tokens.tolist() for answer in answers]
        memory = runner.get_state()
        scored = score_or_replay(
            runner,
            outcomes,
            step=step,
            keys=[(task.prompt.id, 0) for task in tasks],
            prompts=[task.text for task in tasks],
            completions=[answer.text for (answer,) in rows],
            columns={**columns, "completion_ids": ids, "completion_tokens": [len(tokens) for tokens in ids]},
        )
        runner.set_state(memory)
        rewards = [reward for reward in scored.rewards if reward is not None]
        return {
            "validation/reward": _mean(rewards),
            "validation/reward_se": standard_error(rewards),
            "validation/n": len(rewards),
            **{
                f"validation/{name}": _mean([v for v in values if v is not None])
                for name, values in scored.parts.items()
            },
            "validation/length": float(np.mean([len(tokens) for tokens in ids])),
            "validation/stopped": float(np.mean([answer.stopped for answer in answers])),
        }

    return evaluate


def _answer(system: System, generator: Generator, policy: Params, prompts: Sequence[Group]) -> list[list[Answer]]:
    rows = generator.run(policy, prompts, key_for(0, 0, "rollout"))
    return [[Answer(found, system.front.chat.decode(found.tokens)) for found in row] for row in rows]


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for fewer than two values.

    >>> standard_error([1.0, 0.0, 1.0, 0.0])
    0.28867513459481287
    """
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / math.sqrt(len(values)))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None
