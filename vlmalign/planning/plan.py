"""A plan: what a config needs on every device, whether it fits, what to take, and how long it lasts at least."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

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
from vlmalign.planning.memory import Phase, phases
from vlmalign.planning.programs import Program, compile_all
from vlmalign.planning.schedule import Times, times
from vlmalign.planning.search import Choice, choose_all
from vlmalign.planning.target import Target
from vlmalign.planning.workload import Workload


class Version(NamedTuple):
    """A workload with what it needs."""

    workload: Workload
    phases: tuple[Phase, ...]
    times: Times

    @property
    def peak(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.peak)


@dataclass(frozen=True)
class Plan:
    """The study as its config stands, and its better self."""

    target: Target
    now: Version
    programs: dict[str, Program]  #: of `now`
    choices: tuple[Choice, ...] = ()
    better: Version | None = None  #: with what was chosen; None: not searched, or nothing fits


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
    plan = Plan(target, _version(workload, programs, target), programs)
    return _improved(plan, say) if search and workload.stages else plan


def _version(workload: Workload, programs: dict[str, Program], target: Target) -> Version:
    return Version(workload, tuple(phases(workload, programs, target)), times(workload, target.device, target.count))


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
    now = plan.now.workload
    better, tried = choose_all(now, plan.target, say, programs=plan.programs)
    if better is None:
        return replace(plan, choices=tried)
    programs = dict(plan.programs)
    for choice in tried[-len(better.stages) :]:
        if better[choice.stage].rows != now[choice.stage].rows:
            # Compiled for other rows; it needs less than the gradients do, and is estimated.
            programs.pop(f"{choice.stage} reference", None)
        if choice.program is not None:
            programs[choice.program.name] = choice.program
    return replace(plan, choices=tried, better=_version(better, programs, plan.target))
