"""A plan: what a config needs on every device, whether it fits, what to take, and how long it lasts at least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from vlmalign.planning.batches import places
from vlmalign.planning.depth import draw_out, shallow_jobs
from vlmalign.planning.jobs import (
    Job,
    Make,
    apply_job,
    encode_job,
    made_by,
    merge_job,
    micro_job,
    reference_job,
    rollout_jobs,
)
from vlmalign.planning.memory import Phase, phases, usable
from vlmalign.planning.programs import Program, compile_all
from vlmalign.planning.schedule import Times, times
from vlmalign.planning.search import Choice, choose_all
from vlmalign.planning.target import Target
from vlmalign.planning.workload import Workload


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
    return _improved(plan, say) if search and workload.stages else plan


def jobs(workload: Workload, target: Target) -> list[Job]:
    """Every program of the run."""
    made = _training(workload, target) | _optimisers(workload, target)
    return [make(workload.model) for make in made.values()] + _others(workload, target)


def _training(workload: Workload, target: Target) -> dict[str, Make]:
    """The programs whose compilation takes long where layers are many; the longest first."""
    found = {}
    for update in workload.stages:
        found[f"{update.name} gradients"] = made_by(micro_job, update, target)
        if update.objective.needs_reference:
            found[f"{update.name} reference"] = made_by(reference_job, update, target)
    return found


def _optimisers(workload: Workload, target: Target) -> dict[str, Make]:
    return {f"{update.name} optimiser": made_by(apply_job, update, target) for update in workload.stages}


def _others(workload: Workload, target: Target) -> list[Job]:
    model, where = workload.model, places(target, workload.model)
    found = []
    for sampled in {update.rollout.name: update.rollout for update in workload.stages if update.rollout}.values():
        prefill, decode = rollout_jobs(model, sampled, where, target)
        found += [decode, prefill]
    if found:
        found.append(merge_job(model, where, target))
    if workload.encodes:
        found.append(encode_job(model, where))
    return found


def _compiled(workload: Workload, target: Target, say: Callable[[str], None], quick: bool) -> dict[str, Program]:
    model = workload.model
    parts = {name: shallow_jobs(make, model) for name, make in _optimisers(workload, target).items()}
    for name, make in _training(workload, target).items():
        parts[name] = shallow_jobs(make, model) if quick else [make(model)]
    found = compile_all([*itertools.chain(*parts.values()), *_others(workload, target)], target, say)
    return {name: draw_out(name, [found.pop(job.name) for job in part], model) for name, part in parts.items()} | found


def _improved(plan: Plan, say: Callable[[str], None]) -> Plan:
    """With the fastest policy under which every stage has rows that fit."""
    target = plan.target
    proposed, tried = choose_all(plan.workload, target, say, programs=plan.programs)
    if proposed is None:
        return replace(plan, choices=tried)
    programs = dict(plan.programs)
    for choice in tried[-len(proposed.stages) :]:
        if proposed[choice.stage].rows != plan.workload[choice.stage].rows:
            # Compiled for other rows; it needs less than the gradients do, and is estimated.
            programs.pop(f"{choice.stage} reference", None)
        if choice.program is not None:
            programs[choice.program.name] = choice.program
    return replace(
        plan,
        choices=tried,
        proposed=proposed,
        proposed_phases=tuple(phases(proposed, programs, target)),
        proposed_times=times(proposed, target.device, target.count),
    )
