"""A study's config in the numbers that decide what it needs: shapes of batches, passes per step, steps.

Here ChexReason's; `align_workload` reads those of `vlmalign align`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import optax

from vlmalign.data.groups import round_up
from vlmalign.models.model import Model
from vlmalign.objectives.grpo import grpo_counts, grpo_loss
from vlmalign.objectives.grpo_settings import GrpoSettings
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.planning.inputs import Lengths
from vlmalign.rollout.sampling import Sampling
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser
from vlmalign.training.step import Objective
from vlmalign.training.supervised import Shapes
from vlmalign.types import Layout

#: images that `rollout.features.FeatureStore` encodes at once
CHUNK = 16


#: said of rollouts whose weights are cut
CUT = "what the cut over tensor saves of a rollout's time: it is that of devices that read all weights"


@dataclass(frozen=True)
class Update:
    """Training steps of one stage. Rows and groups are those of all devices together."""

    name: str
    objective: Objective
    optimiser: optax.GradientTransformation
    layout: Layout
    rows: int  #: of a micro-batch
    groups: int  #: of an optimiser batch
    steps: int
    recorded: tuple[str, ...]  #: what a batch brings along beside its tokens
    real: float  #: continuation tokens per group that are no padding

    @property
    def micro_batches(self) -> int:
        return -(-self.groups // self.rows)


@dataclass(frozen=True)
class Sampled:
    """Rollouts of one kind."""

    name: str
    rows: int  #: prompts at once
    group: int
    completion: int  #: the limit, tokens
    sampling: Sampling
    prompt: int  #: padded, tokens
    prompts: int  #: per rollout
    count: int  #: rollouts


@dataclass(frozen=True)
class Workload:
    """Everything a config makes the devices do."""

    model: Model
    lengths: Lengths
    sft: Update | None
    grpo: Update | None  #: or PPO
    rollout: Sampled | None  #: of `grpo`
    updates: int  #: optimiser steps per rollout
    scores_first: bool  #: the policy scores its own completions before the first update
    epoch: float  #: GRPO steps in one pass over its prompts
    films: int  #: distinct ones of the training stages
    evaluation: tuple[Sampled, ...]
    left_out: tuple[str, ...]  #: work of the config whose size is not known
    sft_epoch: float = 0.0  #: steps in one pass of `sft` over its data; 0: not known

    @property
    def stages(self) -> tuple[Update, ...]:
        """What is trained, in order."""
        return tuple(update for update in (self.sft, self.grpo) if update is not None)


def read_workload(config: ChexReasonConfig, model: Model, lengths: Lengths, *, count: int) -> Workload:
    """ChexReason on `count` devices that share rows: what does not divide is rounded up to the next multiple of them."""
    sft, grpo, rollout = config.sft, config.grpo, config.grpo.rollout

    def update(
        name: str, objective: Objective, stage, layout: Layout, groups: int, steps: int, recorded, real
    ) -> Update:
        shapes = Shapes(**stage.shapes.model_dump())
        rows = round_up(min(shapes.rows_of(layout), groups), count)
        optimiser = build_optimiser(OptimiserSettings(**stage.optimiser.model_dump()), steps)
        return Update(name, objective, optimiser, layout, rows, groups, steps, recorded, real)

    def layout(stage, group: int, length: int) -> Layout:
        shapes = stage.shapes
        return Layout(
            round_up(lengths.prompt, shapes.prompt_multiple), group, round_up(length, shapes.completion_multiple)
        )

    scores_first = grpo.updates > 1 or grpo.top_entropy < 1
    recorded = ["rollout_logp", "kept_logp"] + ["old_logp"] * scores_first + ["ref_logp"] * (grpo.beta > 0)
    sample = config.data.sample
    prompt = round_up(lengths.prompt, grpo.shapes.prompt_multiple)
    evaluation, left_out = _evaluation(config, lengths, count)
    if grpo.rollout.tensor > 1:
        left_out = (*left_out, CUT)
    return Workload(
        model,
        lengths,
        sft=update(
            "sft",
            Objective("sft", sft_loss, sft_counts, dropout=True),
            sft,
            layout(sft, 1, lengths.answer),
            sft.batch,
            max(1, round(sft.epochs * sample.sft / sft.batch)),
            (),
            lengths.answer,
        ),
        grpo=update(
            "grpo",
            _grpo_objective(config),
            grpo,
            layout(grpo, rollout.group, rollout.completion),
            grpo.prompts,
            grpo.steps,
            tuple(recorded),
            rollout.group * lengths.completion,
        ),
        rollout=Sampled(
            "rollout",
            round_up(min(rollout.rows, grpo.prompts), count),
            rollout.group,
            rollout.completion,
            Sampling(rollout.temperature, rollout.top_p),
            prompt,
            grpo.prompts,
            grpo.steps // grpo.updates,
        ),
        updates=grpo.updates,
        scores_first=scores_first,
        epoch=sample.rl / grpo.prompts * grpo.updates,
        films=sample.sft + sample.rl + sample.validation,
        evaluation=evaluation,
        left_out=left_out,
        sft_epoch=sample.sft / sft.batch,
    )


def _grpo_objective(config: ChexReasonConfig) -> Objective:
    settings = config.grpo
    loss = GrpoSettings(
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        beta=settings.beta,
        max_completion=settings.rollout.completion,
        loss=settings.loss,
        delta=settings.delta,
        kl=settings.kl,
        mask_truncated=settings.mask_truncated,
        top_entropy=settings.top_entropy,
    )
    return Objective(
        "grpo",
        partial(grpo_loss, settings=loss),
        partial(grpo_counts, settings=loss),
        temperature=settings.rollout.temperature,
        needs_reference=settings.beta > 0,
    )


def _evaluation(config: ChexReasonConfig, lengths: Lengths, count: int) -> tuple[tuple[Sampled, ...], tuple[str, ...]]:
    """Greedy answers of base, SFT and GRPO on each set whose size the config states; and what is left out."""
    settings = config.evaluation
    found, left_out = (
        [],
        ["validation while training"] * (config.sft.validation.every + config.grpo.validation.every > 0),
    )
    for each in settings.sets:
        if each.limit is None:
            left_out.append(f"evaluation on {each.films.name}, whose size the config does not state")
            continue
        found.append(
            Sampled(
                each.films.name,
                round_up(min(settings.rows, each.limit), count),
                1,
                settings.completion,
                Sampling(0.0),
                round_up(lengths.prompt, settings.prompt_multiple),
                each.limit,
                3,
            )
        )
    return tuple(found), tuple(left_out)
