"""The two ways of learning from own completions, GRPO and PPO: rewards always go through the runner and are recorded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import partial

from vlmalign import exchange
from vlmalign.mesh import Placement
from vlmalign.rewards.outcomes import OutcomeFile
from vlmalign.rewards.runner import RewardRunner
from vlmalign.rollout.sampling import Sampling
from vlmalign.studies.engine.objective import BESIDE, objective_beside, objective_of
from vlmalign.studies.engine.reward_config import Rewards
from vlmalign.studies.engine.stage_config import Grpo, Ppo
from vlmalign.studies.engine.validate import greedy_rewards, watching
from vlmalign.studies.engine.work import Work
from vlmalign.training.beside import BesideSource
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.controlled_rewards import ControlledRewards
from vlmalign.training.label_dropout import with_label_dropout
from vlmalign.training.loop import Finished, Source, train_states
from vlmalign.training.optimiser import build_optimiser
from vlmalign.training.policy import PolicySource
from vlmalign.training.recorded_rewards import PRINTED, RecordedRewards
from vlmalign.training.step import Trainer
from vlmalign.training.supervised import SupervisedSource
from vlmalign.training.value_head import init_value_head, split_value_head

#: in a stage's folder: every completion; what each was given while training, and in validation
COMPLETIONS, OUTCOMES, HELD_OUT = "completions.jsonl", "rewards.jsonl", "validation-rewards.jsonl"


def run_policy(stage: Grpo | Ppo, work: Work, rewards: Rewards) -> Finished:
    """GRPO or PPO, without PPO's value head in what it ends with."""
    base, rollout, tasks = work.base, stage.rollout, work.texts.train.items
    mix = stage.sft if isinstance(stage, Grpo) else None
    trainer_of = partial(
        Trainer,
        work.model,
        optimiser=build_optimiser(stage.optimiser.settings, stage.steps),
        seed=work.seed,
        placement=base.devices.training_of(work.model),
    )
    trainer = trainer_of(
        objective_of(stage),
        reference=base.reference(work.reference) if stage.needs_reference else None,
        beside=None if mix is None else trainer_of(objective_beside(mix)),
    )
    where: Placement | None = base.devices.sampling(rollout.tensor)
    params = work.first()
    if isinstance(stage, Ppo):
        params = {**params, **init_value_head(base.front.shape.decoder.embed)}
    with ExitStack() as open_files:
        runner = open_files.enter_context(
            RewardRunner(rewards, **stage.scoring.model_dump(), output=work.folder / PRINTED)
        )
        outcomes = open_files.enter_context(closing(OutcomeFile(work.folder / OUTCOMES, exchange)))
        recorded = RecordedRewards(runner, outcomes)
        control = controlled(stage, recorded, {name: weight for name, (_, weight) in rewards.items()})
        score = control or recorded
        source: Source = PolicySource(
            tasks,
            generator=base.generator(
                [task.prompt for task in tasks],
                rows=rollout.rows,
                group=rollout.group,
                completion=rollout.completion,
                multiple=stage.shapes.prompt_multiple,
                sampling=Sampling(rollout.temperature, rollout.top_p),
                where=where,
            ),
            trainer=trainer,
            base=work.frozen,
            decode=base.front.chat.decode,
            score=with_label_dropout(score, stage.label_dropout, seed=work.seed),
            shapes=work.shapes(stage),
            settings=stage.rollout_settings(work.seed),
            memory=score,
            control=control,
            log=open_files.enter_context(closing(CompletionLog(work.folder / COMPLETIONS, work.name_image))),
            bring=lambda merged: base.devices.bring(merged, where),
        )
        if mix is not None:
            answers = work.texts.beside.items
            more = SupervisedSource(
                answers, batch=mix.batch, shapes=work.shapes(stage), features=base.features, seed=work.seed
            )
            source = BesideSource(source, more, prefix=BESIDE)
        evaluate = None
        if work.texts.validation is not None:
            held_out = open_files.enter_context(closing(OutcomeFile(work.folder / HELD_OUT, exchange)))
            evaluate = watching(stage, work, greedy_rewards(stage, work, runner, held_out))
        shown = ("reward", *list(rewards)[:2], "length", "kl")
        stretch = work.stretch(stage, stage.steps, shown=shown, rewards=runner.weighted)
        found = train_states(stretch, trainer, params, work.frozen, source, work.progress, evaluate)
        for note in () if control is None else control.notes():
            work.progress.say(f"stage {work.name}: {note}")
    best = None if found.best is None else split_value_head(found.best)[0]
    return found._replace(last=split_value_head(found.last)[0], best=best)


def controlled(stage: Grpo | Ppo, recorded: RecordedRewards, weights: Mapping[str, float]) -> ControlledRewards | None:
    """The rewards with weights that follow a controller, where the stage has one."""
    if not isinstance(stage, Grpo) or stage.control is None:
        return None
    capabilities = stage.control.grouped([name for name, weight in weights.items() if weight])
    controller = stage.control.controller(capabilities)
    return ControlledRewards(recorded, controller, capabilities, weights, attempts=stage.attempts)
