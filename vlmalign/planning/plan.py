"""A plan: what a config needs on every device, whether it fits, what to take, and how long it lasts at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vlmalign.models.decoder import REMAT
from vlmalign.planning.batches import places
from vlmalign.planning.jobs import Job, apply_job, encode_job, merge_job, micro_job, reference_job, rollout_jobs
from vlmalign.planning.memory import Phase, phases, usable
from vlmalign.planning.programs import Program, compile_all
from vlmalign.planning.schedule import Times, times
from vlmalign.planning.search import Choice, changed, choose_rows, stage_of
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


def make_plan(workload: Workload, target: Target, *, search: bool, say: Callable[[str], None]) -> Plan:
    """Compile the config's programs for the target (where that can be done), and look for better settings."""
    programs: dict[str, Program] = {}
    if target.devices:
        programs = compile_all(jobs(workload, target), target, say)
    elif target.refusal:
        say(f"arithmetic only: {target.refusal}")
    found = tuple(phases(workload, programs, target))
    timing = times(workload, target.device, target.count)
    plan = Plan(target, workload, programs, found, timing, (), None, (), None)
    return _improved(plan, say) if search else plan


def jobs(workload: Workload, target: Target) -> list[Job]:
    """Every program of the run."""
    model, where = workload.model, places(target, workload.model)
    found = []
    for update in reversed(workload.stages):
        found.append(micro_job(model, update, where, target))
        if update.objective.needs_reference:
            found.append(reference_job(model, update, where, target))
    if workload.rollout is not None:
        found += rollout_jobs("rollout", model, workload.rollout, where, target)
        found.append(merge_job(model, where, target))
    if model.config.vision is not None:
        found.append(encode_job(model, where))
    return found + [apply_job(model, update, where, target) for update in workload.stages]


def _improved(plan: Plan, say: Callable[[str], None]) -> Plan:
    """GRPO, where nearly all time goes, chooses the policy; SFT then chooses its rows."""
    target, proposed = plan.target, plan.workload
    choices: list[Choice] = []
    policies = tuple(REMAT)
    for update in reversed(plan.workload.stages):
        choice = choose_rows(proposed, stage_of(update, plan.workload), target, say, policies=policies)
        choices.append(choice)
        if choice.taken is None:
            return replace(plan, choices=tuple(choices))
        proposed, policies = changed(proposed, choice.stage, choice.taken), (choice.taken.remat,)
    programs = dict(plan.programs)
    if target.devices:
        again = []
        for choice in choices:
            before, after = getattr(plan.workload, choice.stage), getattr(proposed, choice.stage)
            if (proposed.model.remat, after.rows) != (plan.workload.model.remat, before.rows):
                again.append(micro_job(proposed.model, after, places(target, proposed.model), target))
            if after.rows != before.rows:
                # Compiled for other rows; it needs less than the gradients do, and is estimated.
                programs.pop(f"{after.name} reference", None)
        programs |= compile_all(again, target, say)
    return replace(
        plan,
        choices=tuple(choices),
        proposed=proposed,
        proposed_phases=tuple(phases(proposed, programs, target)),
        proposed_times=times(proposed, target.device, target.count),
    )
