"""What is measured on held-out cases while a stage trains: losses, preferences, rewards of greedy answers, and what the
task reads in such answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from vlmalign.evaluation.metrics import numbers
from vlmalign.models.model import Params
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.rewards.outcomes import OutcomeFile, score_or_replay
from vlmalign.rewards.runner import RewardRunner
from vlmalign.studies.engine.answer import Decoding, Row, answer, answerer, predictions
from vlmalign.studies.engine.stage_config import Policy, Trains
from vlmalign.studies.engine.work import Watched, Work
from vlmalign.training.loop import Evaluate
from vlmalign.training.preference import PreferenceSource
from vlmalign.training.step import MicroBatch, Trainer
from vlmalign.training.supervised import Shapes, micro_batches


def answers_loss(trainer: Trainer, work: Work, shapes: Shapes) -> Evaluate:
    """ "validation/loss": mean negative log-likelihood of the answers' tokens, nat; "validation/n": conversations."""
    groups = work.texts.validation.items

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        del step
        batches = [MicroBatch(batch, {}) for batch in micro_batches(groups, shapes, work.base.features)]
        total, count = trainer.evaluate(params, work.frozen, batches)["loss"]
        return {"validation/loss": float(total) / float(count), "validation/n": len(groups)}

    return evaluate


def preferences(trainer: Trainer, work: Work, held_out: PreferenceSource, settings: DpoSettings) -> Evaluate:
    """The objective ("validation/loss"), the share of pairs whose chosen answer has the higher reward
    ("validation/accuracy"), the mean margin of rewards, and the number of pairs; `held_out` gives all of them at once."""

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        found = trainer.evaluate(params, work.frozen, held_out.work(step, params).batches)
        mean = {name: float(total) / float(count) for name, (total, count) in found.items()}
        return {
            "validation/loss": sum(weight * mean[f"loss/{name}"] for name, weight in settings.weights.items()),
            "validation/accuracy": mean["rewards/accuracies"],
            "validation/margin": mean["rewards/margins"],
            "validation/n": int(found["rewards/accuracies"][1]),
        }

    return evaluate


def greedy_rewards(stage: Policy, work: Work, runner: RewardRunner, outcomes: OutcomeFile) -> Evaluate:
    """Mean reward of one greedy answer per prompt with its standard error, "validation/reward" and "..._se"; the mean of
    each reward by itself; how many answers could be scored ("validation/n") and ended; and the task's numbers.

    Rewards with memory judge by what they remember of training, and do not remember these answers. Rewards are kept in
    `outcomes`: a continued run reads them there.
    """
    questions = work.texts.validation
    respond = _responder(stage, work, Watched("validation", questions, ()))
    tasks = questions.items
    columns = {name: [task.columns[name] for task in tasks] for name in tasks[0].columns}

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        rows = respond(params)
        memory = runner.get_state()
        scored = score_or_replay(
            runner,
            outcomes,
            step=step,
            keys=[(task.prompt.id, 0) for task in tasks],
            prompts=[task.text for task in tasks],
            completions=[row["completion"] for row in rows],
            columns={
                **columns,
                "completion_ids": [row["ids"] for row in rows],
                "completion_tokens": [row["tokens"] for row in rows],
            },
        )
        runner.set_state(memory)
        rewards = [reward for reward in scored.rewards if reward is not None]
        read = {f"validation/{name}": value for name, value in numbers(work.task, rows).items()}
        return {
            **read,
            "validation/reward": _mean(rewards),
            "validation/reward_se": standard_error(rewards),
            "validation/n": len(rewards),
            **{
                f"validation/{name}": _mean([v for v in values if v is not None])
                for name, values in scored.parts.items()
            },
            "validation/stopped": float(np.mean([row["stopped"] for row in rows])),
        }

    return evaluate


def watching(stage: Trains, work: Work, own: Evaluate) -> Evaluate:
    """`own`, and the task's numbers of greedy answers to every watched set, as "SET/NAME"."""
    watched = [(each, _responder(stage, work, each)) for each in work.texts.watched]
    if not watched:
        return own

    def evaluate(step: int, params: Params) -> dict[str, float | None]:
        found = dict(own(step, params))
        for each, respond in watched:
            for name, value in numbers(work.task, respond(params), labels=each.labels or None).items():
                found.setdefault(f"{each.name}/{name}", value)
        return found

    return evaluate


def _responder(stage: Trains, work: Work, watched: Watched) -> Callable[[Params], list[Row]]:
    """Trained parameters -> prediction rows of greedy answers, with the tokens of each under "ids"."""
    base, validation = work.base, stage.validation
    policy = isinstance(stage, Policy)
    where = base.devices.sampling(stage.rollout.tensor if policy else 1)
    decoding = Decoding(
        completion=validation.completion or stage.rollout.completion,
        rows=validation.rows or (stage.rollout.rows if policy else stage.shapes.rows),
        multiple=stage.shapes.prompt_multiple,
    )
    generator = answerer(base, watched.questions, decoding, where)
    merge = base.merge(work.spec, where)

    def respond(params: Params) -> list[Row]:
        merged = base.devices.bring(merge(work.frozen, params), where)
        # Greedy: no draw depends on the seed.
        found = answer(base, generator, merged, watched.questions, seed=0)
        rows = predictions(
            work.task, watched.questions, found, stage=work.name, dataset=watched.name, labels=watched.labels,
            name_image=work.name_image,
        )  # fmt: skip
        return [{**row, "ids": own[0].completion.tokens.tolist()} for row, own in zip(rows, found, strict=True)]

    return respond


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
