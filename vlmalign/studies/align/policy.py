"""The two stages that learn from their own completions: GRPO and PPO, with the user's rewards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing

from vlmalign import exchange
from vlmalign.mesh import Placement
from vlmalign.rewards.outcomes import OutcomeFile
from vlmalign.rewards.runner import RewardRunner
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.align.policy_config import Grpo, Ppo
from vlmalign.studies.align.policy_objective import objective_of
from vlmalign.studies.align.rewards import Rewards
from vlmalign.studies.align.stages import Work, optimiser_of, stretch
from vlmalign.studies.align.system import Trained
from vlmalign.studies.align.validate import greedy_rewards
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.loop import train
from vlmalign.training.optimiser import build_optimiser
from vlmalign.training.policy import PolicySource
from vlmalign.training.recorded_rewards import RecordedRewards
from vlmalign.training.rollouts import Task
from vlmalign.training.step import Trainer
from vlmalign.training.value_head import init_value_head, split_value_head

#: in a stage's folder: every completion; what each was given while training, and in validation
COMPLETIONS, OUTCOMES, HELD_OUT = "completions.jsonl", "rewards.jsonl", "validation-rewards.jsonl"


def run_policy(stage: Grpo | Ppo, work: Work, start: Trained, rewards: Rewards) -> dict[str, Array]:
    """The trained parameters after GRPO or PPO from `start`, which is also the reference; without PPO's value head."""
    system, rollout = work.system, stage.rollout
    reference = None
    if stage.objective.beta > 0 or stage.kl_in_reward > 0:
        reference = system.reference(start)
    trainer = Trainer(
        system.model,
        objective_of(stage),
        build_optimiser(optimiser_of(stage), stage.steps),
        reference=reference,
        seed=work.seed,
        placement=system.devices.training,
    )
    where = system.devices.sampling(rollout.tensor)
    params = start.params
    if isinstance(stage, Ppo):
        params = {**params, **init_value_head(system.front.shape.decoder.embed)}
    with ExitStack() as open_files:
        runner = open_files.enter_context(RewardRunner(rewards, **stage.scoring.model_dump()))
        outcomes = open_files.enter_context(closing(OutcomeFile(work.folder / OUTCOMES, exchange)))
        recorded = RecordedRewards(runner, outcomes)
        source = PolicySource(
            work.data.train,
            generator=_generator(
                stage,
                work,
                work.data.train,
                rollout.rows,
                rollout.group,
                Sampling(rollout.temperature, rollout.top_p),
                where,
            ),
            trainer=trainer,
            base=system.frozen,
            decode=system.front.chat.decode,
            score=recorded,
            shapes=work.shapes(stage),
            settings=stage.rollout_settings(work.seed),
            memory=recorded,
            log=open_files.enter_context(closing(CompletionLog(work.folder / COMPLETIONS))),
            bring=lambda merged: system.devices.bring(merged, where),
        )
        evaluate = None
        if stage.validation is not None:
            rows = min(stage.validation.rows or rollout.rows, len(work.data.validation))
            evaluate = greedy_rewards(
                trainer,
                system,
                work.data.validation,
                _generator(stage, work, work.data.validation, rows, 1, Sampling(temperature=0.0), where),
                where,
                runner,
                open_files.enter_context(closing(OutcomeFile(work.folder / HELD_OUT, exchange))),
            )
        shown = ("reward", *list(rewards)[:2], "length", "kl")
        plan = stretch(stage, work, stage.steps, shown=shown)
        return split_value_head(train(plan, trainer, params, system.frozen, source, work.progress, evaluate))[0]


def _generator(
    stage: Grpo | Ppo,
    work: Work,
    tasks: Sequence[Task],
    rows: int,
    group: int,
    sampling: Sampling,
    where: Placement | None,
) -> Generator:
    return work.system.generator(
        [task.prompt for task in tasks],
        rows=rows,
        group=group,
        completion=stage.rollout.completion,
        multiple=stage.shapes.prompt_multiple,
        images=work.data.images,
        sampling=sampling,
        where=where,
    )
