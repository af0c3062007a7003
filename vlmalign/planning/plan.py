"""A plan: what a config needs on every device, whether it fits, what to take, and how long it lasts at least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from vlmalign.models.decoder import REMAT
from vlmalign.models.model import Model
from vlmalign.planning.batches import Where, places
from vlmalign.planning.cost import FORWARD_AGAIN
from vlmalign.planning.depth import draw_out, shallow_jobs
from vlmalign.planning.jobs import Job, apply_job, encode_job, merge_job, micro_job, reference_job, rollout_jobs
from vlmalign.planning.memory import Phase, phases, usable
from vlmalign.planning.programs import Program, compile_all
from vlmalign.planning.schedule import Times, times
from vlmalign.planning.search import Candidate, Choice, changed, choose_rows, stage_of
from vlmalign.planning.target import Target
from vlmalign.planning.workload import Update, Workload


@dataclass(frozen=True)
class Plan:
    """`workload`, `phases`, `programs` and `times` are of the config as it stands; `proposed` is its better self."""

    target: Target
    workload: Workload
    programs: dict[str, Program]
    phases: tuple[Phase, ...]
    times: Times
    choices: tuple[Choice, ...]
    proposed: Workload | None  #: with what was chosen; None: not searched, or nothing fits
    proposed_phases: tuple[Phase, ...]
    proposed_times: Times | None

    @property
    def usable(self) -> int:
        """Bytes of one device that may be planned with."""
        return usable(self.target.device.memory)

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)

    @property
    def fits(self) -> bool:
        return self.peak.peak <= self.usable


def make_plan(
    workload: Workload, target: Target, *, search: bool, say: Callable[[str], None], quick: bool = False
) -> Plan:
    """Compile the config's programs for the target (where that can be done), and look for better settings.

    The config's own programs have all their layers when they are compiled, but for optimisers, which update each
    parameter by itself and so are the same over and over. With `quick` all programs of training are drawn out of
    shallow ones (`depth`), as those of the settings that are tried always are.
    """
    programs: dict[str, Program] = {}
    if target.devices:
        programs = _compiled(workload, target, say, quick)
    elif target.refusal:
        say(f"arithmetic only: {target.refusal}")
    found = tuple(phases(workload, programs, target))
    timing = times(workload, target.device, target.count)
    plan = Plan(target, workload, programs, found, timing, (), None, (), None)
    return _improved(plan, say) if search else plan


#: how a program is made for a model of any depth
Make = Callable[[Model], Job]


def jobs(workload: Workload, target: Target) -> list[Job]:
    """Every program of the run."""
    made = _training(workload, target) | _optimisers(workload, target)
    return [make(workload.model) for make in made.values()] + _others(workload, target)


def _training(workload: Workload, target: Target) -> dict[str, Make]:
    """The programs whose compilation takes long where layers are many; the longest first."""
    found = {}
    for update in workload.stages:
        found[f"{update.name} gradients"] = _made(micro_job, update, target)
        if update.objective.needs_reference:
            found[f"{update.name} reference"] = _made(reference_job, update, target)
    return found


def _optimisers(workload: Workload, target: Target) -> dict[str, Make]:
    return {f"{update.name} optimiser": _made(apply_job, update, target) for update in workload.stages}


def _made(job: Callable[[Model, Update, Where, Target], Job], update: Update, target: Target) -> Make:
    return lambda model: job(model, update, places(target, model), target)


def _others(workload: Workload, target: Target) -> list[Job]:
    model, where = workload.model, places(target, workload.model)
    found = []
    if workload.rollout is not None:
        prefill, decode = rollout_jobs("rollout", model, workload.rollout, where, target)
        found += [decode, prefill, merge_job(model, where, target)]
    if model.config.vision is not None:
        found.append(encode_job(model, where))
    return found


def _compiled(workload: Workload, target: Target, say: Callable[[str], None], quick: bool) -> dict[str, Program]:
    model = workload.model
    parts = {name: shallow_jobs(make, model) for name, make in _optimisers(workload, target).items()}
    for name, make in _training(workload, target).items():
        parts[name] = shallow_jobs(make, model) if quick else [make(model)]
    found = compile_all([*itertools.chain(*parts.values()), *_others(workload, target)], target, say)
    drawn = {name: draw_out(name, [found.pop(job.name) for job in part], model) for name, part in parts.items()}
    return drawn | found


def _improved(plan: Plan, say: Callable[[str], None]) -> Plan:
    """With the fastest policy under which every stage has rows that fit; GRPO, where nearly all time goes, chooses first."""
    target = plan.target
    tried: list[Choice] = []
    for policy in sorted(REMAT, key=FORWARD_AGAIN.__getitem__):
        proposed, choices = _chosen(plan, policy, say)
        tried += choices
        if choices[-1].taken is not None:
            break
    else:
        return replace(plan, choices=tuple(tried))
    programs = dict(plan.programs)
    for choice in choices:
        before, after = getattr(plan.workload, choice.stage), getattr(proposed, choice.stage)
        if after.rows != before.rows:
            # Compiled for other rows; it needs less than the gradients do, and is estimated.
            programs.pop(f"{after.name} reference", None)
        if choice.program is not None:
            programs[choice.program.name] = choice.program
    return replace(
        plan,
        choices=tuple(tried),
        proposed=proposed,
        proposed_phases=tuple(phases(proposed, programs, target)),
        proposed_times=times(proposed, target.device, target.count),
    )


def _chosen(plan: Plan, policy: str, say: Callable[[str], None]) -> tuple[Workload, list[Choice]]:
    """The workload with the rows that each stage chose under this policy, up to the first one for which nothing fits."""
    proposed, choices = plan.workload, []
    for update in reversed(plan.workload.stages):
        known = {}
        if f"{update.name} gradients" in plan.programs:
            configured = Candidate(plan.workload.model.remat, update.rows)
            known = {configured: plan.programs[f"{update.name} gradients"]}
        stage = stage_of(update, plan.workload)
        scales = choices[-1].scales if choices else {}
        choices.append(choose_rows(proposed, stage, plan.target, say, policies=(policy,), known=known, scales=scales))
        if (taken := choices[-1].taken) is None:
            break
        proposed = changed(proposed, stage, taken)
    return proposed, choices
