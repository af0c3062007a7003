"""The settings of `vlmalign align` in the numbers that decide what they need: see `workload`.

Planned are one stage that learns from answers (sft or dpo) and one that learns from its completions (grpo or ppo).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TypeVar

from vlmalign.data.groups import round_up
from vlmalign.models.model import Model
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.planning.inputs import Lengths
from vlmalign.planning.workload import CUT, Sampled, Update, Workload
from vlmalign.rollout.sampling import Sampling
from vlmalign.studies.align.config import AlignConfig, AnyStage
from vlmalign.studies.align.policy_config import Grpo, Policy, Ppo
from vlmalign.studies.align.policy_objective import objective_of
from vlmalign.studies.align.stage_config import Dpo, Epochs, Sft, Stage
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser
from vlmalign.training.preference import preference_objective
from vlmalign.training.step import Objective
from vlmalign.training.supervised import Shapes
from vlmalign.types import Layout

Kind = TypeVar("Kind", bound=Stage)


def align_lengths(config: AlignConfig, *, prompt: int | None, answer: int | None, completion: int | None) -> Lengths:
    """Given lengths, and for the others the limits that the stages state.

    Raises:
        ValueError: for a length that is neither given nor limited.
    """
    known = {}
    learnt, sampled = _one(config, Epochs), _one(config, Policy)
    if prompt is None:
        limits = [stage.data.max_prompt for stage in (learnt, sampled) if stage is not None]
        if None in limits:
            raise ValueError(
                "how long prompts are is not known: set max_prompt in every data section, or give --prompt-tokens to "
                "`vlmalign plan`"
            )
        prompt, known["prompt"] = max(limits), "the limit of the data"
    if answer is None and learnt is not None:
        answer, known["answer"] = learnt.data.max_completion, "the limit of the data"
        if answer is None:
            raise ValueError(
                "how long answers are is not known: set max_completion in the data section, or give --answer-tokens to "
                "`vlmalign plan`"
            )
    limit = None if sampled is None else sampled.rollout.completion
    if completion is None:
        completion, known["completion"] = limit or 1, "the limit: every completion runs to its end"
    elif limit is not None and not 1 <= completion <= limit:
        raise ValueError(f"completions have 1 to {limit} tokens (rollout.completion), found {completion}")
    given = {"prompt": "given", "answer": "given" if learnt is not None else "no such stage", "completion": "given"}
    return Lengths(prompt, answer or 1, completion, given | known)


def read_align(config: AlignConfig, model: Model, lengths: Lengths, *, count: int) -> Workload:
    """On `count` devices that share rows: what does not divide is rounded up to the next multiple of them.

    Raises:
        ValueError: for a config with two stages of one sort.
    """
    learnt, sampled = _one(config, Epochs), _one(config, Policy)
    left_out = [f"validation in stage {stage.kind}" for stage in config.stages if stage.validation is not None]
    if model.config.vision is not None:
        left_out.append("encoding images, whose number the config does not state")
    if sampled is not None and sampled.rollout.tensor > 1:
        left_out.append(CUT)
    first = None
    if learnt is not None:
        first = _learnt(learnt, lengths, count)
        if first.recorded:
            left_out.append(f"scoring the pairs of stage {learnt.kind} with its reference, once, before it is trained")
        of = f"an epoch of stage {learnt.kind}" if learnt.steps else f"stage {learnt.kind} but for one step"
        left_out.append(f"the time of {of}: the config does not say how many examples there are")
    if sampled is None:
        return Workload(model, lengths, first, None, None, 1, False, 0.0, 0, (), tuple(left_out))
    left_out.append(f"the time of an epoch of stage {sampled.kind}: the config does not say how many prompts there are")
    settings = sampled.rollout_settings(0)
    rollout = Sampled(
        "rollout",
        round_up(sampled.rollout.rows, count),
        sampled.rollout.group,
        sampled.rollout.completion,
        Sampling(sampled.rollout.temperature, sampled.rollout.top_p),
        round_up(lengths.prompt, sampled.shapes.prompt_multiple),
        sampled.prompts,
        sampled.steps // sampled.updates,
    )
    return Workload(
        model,
        lengths,
        sft=first,
        grpo=_sampled(sampled, lengths, count),
        rollout=rollout,
        updates=sampled.updates,
        scores_first=settings.scores_first,
        epoch=0.0,
        films=0,
        evaluation=(),
        left_out=tuple(left_out),
    )


def _one(config: AlignConfig, kind: type[Kind]) -> Kind | None:
    found = [stage for stage in config.stages if isinstance(stage, kind)]
    if len(found) > 1:
        raise ValueError(
            f"planned is one stage of a sort, found {' and '.join(stage.kind for stage in found)}; plan them one by one, "
            "each from a file without the other"
        )
    return found[0] if found else None


def _learnt(stage: Sft | Dpo, lengths: Lengths, count: int) -> Update:
    if isinstance(stage, Sft):
        loss, counts = partial(sft_loss, kind=stage.loss), partial(sft_counts, kind=stage.loss)
        objective, group, recorded = Objective("sft", loss, counts, dropout=True), 1, ()
    else:
        settings = stage.objective.settings()
        objective, group = preference_objective(settings, recorded=settings.needs_reference), 2
        recorded = ("ref_logp",) * settings.needs_reference
    steps = stage.steps or 1
    return _update(stage, objective, lengths.prompt, group, lengths.answer, stage.batch, steps, recorded, count)


def _sampled(stage: Grpo | Ppo, lengths: Lengths, count: int) -> Update:
    first = stage.rollout_settings(0).scores_first
    # A penalty within the rewards compares with a reference as well, which the loss alone does not ask for.
    reference = stage.objective.beta > 0 or stage.kl_in_reward > 0
    recorded = ["rollout_logp", "kept_logp"] + ["old_logp"] * first + ["ref_logp"] * reference
    recorded += ["old_values", "returns", "advantage"] * isinstance(stage, Ppo)
    update = _update(
        stage, replace(objective_of(stage), needs_reference=reference), lengths.prompt, stage.rollout.group, stage.rollout.completion, stage.prompts,
        stage.steps, tuple(recorded), count,
    )  # fmt: skip
    real = stage.rollout.group * lengths.completion
    return Update(**{**vars(update), "real": real})


def _update(
    stage: AnyStage, objective: Objective, prompt: int, group: int, length: int, groups: int, steps: int,
    recorded: tuple[str, ...], count: int,
) -> Update:  # fmt: skip
    section = stage.shapes
    layout = Layout(round_up(prompt, section.prompt_multiple), group, round_up(length, section.completion_multiple))
    rows = Shapes(**section.model_dump() | {"rows": round_up(section.rows, count)}, shares=count).rows_of(layout)
    optimiser = build_optimiser(OptimiserSettings(**stage.optimiser.model_dump()), steps)
    rows = round_up(min(rows, groups), count)
    return Update(stage.kind, objective, optimiser, layout, rows, groups, steps, recorded, group * length)
