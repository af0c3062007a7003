"""The two training stages: SFT on reasoning traces, then GRPO on the hard reward from the SFT adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlmalign.data.answers import answer_text, film_example, label_trace
from vlmalign.data.phantoms.traces import read_traces
from vlmalign.distributed import own_share
from vlmalign.exchange import gather_from
from vlmalign.models.lora import init_adapter
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.progress import Progress
from vlmalign.randomness import key_for
from vlmalign.rewards.hard import HardReward
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.studies.chexreason.films import LabelledFilms
from vlmalign.studies.chexreason.system import System
from vlmalign.studies.chexreason.validate import best_of, build_evaluate
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.loop import Stage, train
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser, learning_rate
from vlmalign.training.policy import PolicySource
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import Task
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.training.supervised import SupervisedSource, micro_batches
from vlmalign.types import Group

Adapter = Mapping[str, Array]


def run_sft(
    config: ChexReasonConfig,
    system: System,
    films: LabelledFilms,
    rows: np.ndarray,
    validation: np.ndarray,
    progress: Progress,
) -> Adapter:
    """The adapter after supervised fine-tuning on these films, continuing an interrupted stage."""
    settings = config.sft
    steps = max(1, round(settings.epochs * len(rows) / settings.batch))
    optimiser = OptimiserSettings(**settings.optimiser.model_dump())
    trainer = Trainer(
        system.model,
        Objective("sft", sft_loss, sft_counts, dropout=True),
        build_optimiser(optimiser, steps),
        seed=config.seed,
        placement=system.devices.training,
    )
    shapes = system.shapes(settings.shapes)
    source = SupervisedSource(
        _examples(config, system, films, rows),
        batch=settings.batch,
        shapes=shapes,
        features=system.features,
        seed=config.seed,
    )
    held_out = _examples(config, system, films, validation) if settings.validation.every else []
    answers = [MicroBatch(b, {}) for b in micro_batches(held_out, shapes, system.features)] if held_out else []
    stage = Stage(
        "sft",
        config.run / "sft",
        steps,
        settings.checkpoint_every,
        learning_rate(optimiser, steps),
        evaluate_every=settings.validation.every,
        best=best_of(settings.validation),
    )
    evaluate = build_evaluate(config, settings.validation, system, trainer, films, validation, answers)
    adapter = init_adapter(system.model.shapes, system.base, key=key_for(config.seed, 0, "adapter"))
    return train(stage, trainer, adapter, system.base, source, progress, evaluate)


def _examples(config: ChexReasonConfig, system: System, films: LabelledFilms, rows: np.ndarray) -> list[Group]:
    traces = None if config.data.traces is None else read_traces(config.place(config.data.traces))
    groups = []
    for row in rows:
        example = films.example(int(row))
        if traces is not None and example.id not in traces:
            raise ValueError(
                f"{config.place(config.data.traces)} has no trace for film {example.id}, which was drawn for SFT; "
                "add it, or set data.traces to null for reasoning that only names the labels"
            )
        trace = label_trace(example.labels) if traces is None else traces[example.id]
        messages = film_example(str(example.image), config.prompt, answer_text(trace, example.labels))
        groups.append(system.chat.example(messages, group_id=int(row), name=f"film {example.id}"))
    return groups


def run_grpo(
    config: ChexReasonConfig,
    system: System,
    films: LabelledFilms,
    rows: np.ndarray,
    validation: np.ndarray,
    sft: Adapter,
    progress: Progress,
) -> Adapter:
    """The adapter after GRPO from the SFT adapter, which stays frozen as the reference."""
    settings, rollout = config.grpo, config.grpo.rollout
    optimiser = OptimiserSettings(**settings.optimiser.model_dump())
    loss = GrpoSettings(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        beta=settings.beta,
        max_completion=rollout.completion,
        loss=settings.loss,
        delta=settings.delta,
        kl=settings.kl,
        mask_truncated=settings.mask_truncated,
        top_entropy=settings.top_entropy,
    )
    objective = Objective(
        "grpo",
        loss=lambda scores, batch: grpo_loss(scores, batch, settings=loss),
        counts=lambda batches: grpo_counts(batches, settings=loss),
        temperature=rollout.temperature,
        needs_reference=settings.beta > 0,
    )
    trainer = Trainer(
        system.model,
        objective,
        build_optimiser(optimiser, settings.steps),
        reference=(system.model, sft),
        placement=system.devices.training,
    )
    tasks = [_task(system, films, int(row)) for row in rows]
    reward = HardReward(films.labels, settings.reward.min_tokens, settings.reward.lambda_len)
    source = PolicySource(
        tasks,
        generator=system.generator(
            [task.prompt for task in tasks],
            rows=rollout.rows,
            group=rollout.group,
            completion=rollout.completion,
            multiple=settings.shapes.prompt_multiple,
            sampling=Sampling(rollout.temperature, rollout.top_p),
        ),
        trainer=trainer,
        base=system.base,
        decode=system.chat.decode,
        score=lambda number, keys, prompts, completions, columns: hard_scores(reward, completions, columns),
        shapes=system.shapes(settings.shapes),
        settings=RolloutSettings(
            settings.prompts,
            updates=settings.updates,
            attempts=settings.attempts,
            overlong_buffer=settings.overlong_buffer,
            scale=settings.scale,
            top_entropy=settings.top_entropy,
            seed=config.seed,
        ),
        log=CompletionLog(config.run / "grpo" / "completions.jsonl"),
        bring=system.bring,
    )
    stage = Stage(
        "grpo",
        config.run / "grpo",
        settings.steps,
        settings.checkpoint_every,
        learning_rate(optimiser, settings.steps),
        shown=("reward", "valid", "length", "kl"),
        evaluate_every=settings.validation.every,
        best=best_of(settings.validation),
    )
    evaluate = build_evaluate(config, settings.validation, system, trainer, films, validation, [])
    # A copy: training gives its buffers back as it goes, and the reference must keep the SFT values.
    start = {name: value.copy() for name, value in sft.items()}
    return train(stage, trainer, start, system.base, source, progress, evaluate)


def _task(system: System, films: LabelledFilms, row: int) -> Task:
    example = films.example(row)
    return Task(system.question(example, row), system.prompt, {"truth": example.labels})


def hard_scores(reward: HardReward, completions: Sequence[str], columns: Mapping[str, list[Any]]) -> ScoredBatch:
    """The hard reward with its components, for the log; of several processes each scores its share."""
    rows = list(zip(completions, columns["truth"], columns["completion_tokens"], strict=True))

    def own() -> list[list[float]]:
        found = [reward.score(text, truth=truth, completion_tokens=length) for text, truth, length in own_share(rows)]
        return [[b.total, float(b.valid), b.jaccard, b.length_penalty] for b in found]

    found = gather_from(own)
    rewards, *parts = ([row[i] for row in found] for i in range(4))
    return ScoredBatch(rewards, dict(zip(("valid", "jaccard", "length_penalty"), parts, strict=True)), ())
