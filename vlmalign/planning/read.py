"""A study read in numbers: one workload for each model, with every stage that trains it and every set that it answers.

Stages that run the same programs (one objective, one optimiser, one layout) become one `Update`, and are planned once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vlmalign.data.groups import round_up
from vlmalign.models.config import SiglipConfig
from vlmalign.models.model import Model
from vlmalign.planning.lengths import Texts, UnknownLength
from vlmalign.planning.workload import Lengths, Sampled, Update, Workload
from vlmalign.rollout.sampling import Sampling
from vlmalign.studies.engine.config import StudyConfig, stage_ref
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.objective import objective_of
from vlmalign.studies.engine.stage_config import Dpo, ModelStage, Policy, Ppo, Trains
from vlmalign.training.optimiser import build_optimiser
from vlmalign.training.supervised import Shapes
from vlmalign.types import Layout

#: a setting that the config leaves to the plan
AUTO = "auto"


def read_workload(
    config: StudyConfig, names: Sequence[str], model: Model, texts: Texts, *, shares: int
) -> Workload | None:
    """What these stages, all of this model, make devices do that cut rows into `shares` parts; rows that do not divide
    are rounded up. None where they neither train nor answer.

    Raises:
        ValueError: as `Texts.of_stage`.
    """
    trained = {name: config.stages[name] for name in names if name in config.trained}
    updates = {name: read_update(stage, name, model, texts, shares=shares) for name, stage in trained.items()}
    answered, unknown = _answered(config, names, model, texts, shares)
    if not (updates or answered):
        return None
    if all(isinstance(config.stages[name], ModelStage) for name in names):
        model = model.without_lora()
    left_out = [text for name, stage in trained.items() for text in _left_out(stage, name, updates[name])]
    data = {
        each.set or str(each.path): each
        for name, stage in trained.items()
        for data in stage.reads.values()
        for each in data.parts
        if updates[name].lengths.images
    }
    films = {name: texts.number(each) for name, each in data.items()}
    fixed = isinstance(model.config.vision, SiglipConfig)
    left_out += [f"encoding the images of {name}" for name, number in films.items() if number is None or not fixed]
    left_out += [f"what probe {name} measures" for name, probe in config.probes.items() if probe.variants()]
    bases = tuple(dict.fromkeys(config.base_of(name) for name in names))
    return Workload(
        model,
        bases,
        _together(trained, updates),
        sum(number or 0 for number in films.values()) if fixed else 0,
        tuple(answered),
        (*dict.fromkeys(left_out), *unknown),
        open_remat=config.stages[bases[0]].remat == AUTO,
    )


def read_update(stage: Trains, name: str, model: Model, texts: Texts, *, shares: int) -> Update:
    """The training of one stage."""
    section, lengths, cases = stage.shapes, texts.of_stage(name, model.config), texts.number(stage.data)
    prompt = round_up(lengths.prompt, section.prompt_multiple)
    if isinstance(stage, Policy):
        groups, group, longest = stage.prompts, stage.rollout.group, stage.rollout.completion
    else:
        groups, group, longest = stage.batch, 1 + isinstance(stage, Dpo), lengths.answer
    layout = Layout(prompt, group, round_up(longest, section.completion_multiple))
    rows = round_up(groups if section.rows == AUTO else section.rows, shares)
    shapes = Shapes(**section.model_dump() | {"rows": rows}, shares=shares)
    steps = stage.steps if cases is None or isinstance(stage, Policy) else stage.length(cases)
    objective, recorded, rollout, updates = objective_of(stage), [], None, 1
    if isinstance(stage, Policy):
        # A penalty within the rewards compares with a reference as well, which the loss alone does not ask for.
        objective, updates = replace(objective, needs_reference=stage.needs_reference), stage.updates
        rollout = _rollout(stage, name, lengths, prompt, shares)
        recorded = ["rollout_logp", "kept_logp"] + ["old_logp"] * stage.rollout_settings(0).scores_first
        recorded += ["ref_logp"] * stage.needs_reference
        recorded += ["old_values", "returns", "advantage"] * isinstance(stage, Ppo)
    elif isinstance(stage, Dpo):
        recorded = ["ref_logp"] * stage.objective.settings().needs_reference
    optimiser, rows = build_optimiser(stage.optimiser.settings, steps or 1), min(shapes.rows_of(layout), groups)
    return Update(
        (name,), objective, optimiser, layout, round_up(rows, shares), groups, steps or 1, tuple(recorded), lengths,
        epoch=(cases or 0) / groups * updates,
        rollout=rollout,
        open_rows=section.rows == AUTO,
        open_rollout=rollout is not None and stage.rollout.rows == AUTO,
    )  # fmt: skip


def _rollout(stage: Policy, name: str, lengths: Lengths, prompt: int, shares: int) -> Sampled:
    rollout = stage.rollout
    rows = round_up(stage.prompts if rollout.rows == AUTO else rollout.rows, shares)
    return Sampled(
        name, rows, rollout.group, rollout.completion, Sampling(rollout.temperature, rollout.top_p), prompt,
        lengths, stage.prompts, stage.steps // stage.updates,
    )  # fmt: skip


def _answered(
    config: StudyConfig, names: Sequence[str], model: Model, texts: Texts, shares: int
) -> tuple[list[Sampled], list[str]]:
    """The answers of these stages to sets whose size is known; and what is left out."""
    found, left_out = [], []
    for title, entry in config.answers.items():
        states = [ref for ref in entry.stages if stage_ref(ref).name in names]
        for ref in entry.sets if states else ():
            size = texts.number(Data(set=ref))
            try:
                lengths = texts.of_answers(stage_ref(states[0]).name, model.config, ref, entry)
            except UnknownLength:
                lengths = None
            if size is None or lengths is None:
                what = "size" if size is None else "questions' length"
                left_out.append(f"answers {title} to set {ref}, whose {what} is not known")
                continue
            rows, prompt = round_up(min(entry.rows, size), shares), round_up(lengths.prompt, entry.prompt_multiple)
            found += [
                Sampled(
                    f"{title} {ref}", rows, entry.samples, entry.completion, Sampling(entry.temperature, entry.top_p),
                    prompt, lengths, size, len(states),
                )
            ]  # fmt: skip
    return found, left_out


def _together(stages: Mapping[str, Trains], updates: Mapping[str, Update]) -> tuple[Update, ...]:
    """Those that run the same programs as one."""
    found: dict[tuple, Update] = {}
    sampling: dict[tuple, str] = {}
    for name, stage in stages.items():
        update = updates[name]
        rollout = update.rollout
        loss = stage.loss if stage.kind == "sft" else stage.objective.model_dump_json()
        own = ("stages", "steps", "objective", "optimiser", "rollout")
        numbers = tuple(value for field, value in vars(update).items() if field not in own)
        if rollout is not None:  # stages that sample alike share those programs, whatever they learn
            rollout = replace(rollout, name=sampling.setdefault(rollout.shape, name))
            update = replace(update, rollout=rollout)
        shape = None if rollout is None else rollout.shape
        key = (stage.kind, loss, stage.optimiser.name, stage.optimiser.clip_norm, numbers, shape)
        if key in found:
            first = found[key]
            stages_of, steps = (*first.stages, name), first.steps + update.steps
            if rollout is not None:
                rollout = replace(rollout, count=first.rollout.count + rollout.count)
            update = replace(first, stages=stages_of, steps=steps, rollout=rollout)
        found[key] = update
    return tuple(found.values())


def _left_out(stage: Trains, name: str, update: Update) -> Iterable[str]:
    """What a stage does that is in no figure."""
    if stage.validation is not None:
        yield f"validation in stage {name}"
    if "sft.data" in stage.learns_from:
        yield f"the SFT loss beside stage {name}"
    if isinstance(stage, Dpo) and update.recorded:
        yield f"scoring the pairs of stage {name} with its reference, once, before it is trained"
    if not update.epoch:
        but = f"stage {name} but for one step" if stage.steps is None else f"an epoch of stage {name}"
        yield f"the time of {but}: how many cases there are is not known"
    if isinstance(stage, Policy) and stage.rollout.tensor > 1:
        yield "what the cut over tensor saves of a rollout's time: it is that of devices that read all weights"
