"""A plan: what a config needs on every device, whether it fits, what to take, and how long it lasts at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from vlmalign.planning.batches import places
from vlmalign.planning.jobs import Job, apply_job, encode_job, merge_job, micro_job, reference_job, rollout_jobs
from vlmalign.planning.memory import Phase, phases, usable
from vlmalign.planning.programs import Program, compile_all
from vlmalign.planning.schedule import Times, times
from vlmalign.planning.search import Candidate, Choice, changed, choose
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
    model, where = workload.model, places(target)
    found = [
        micro_job(model, workload.grpo, where, target),
        micro_job(model, workload.sft, where, target),
        *rollout_jobs("rollout", model, workload.rollout, where, target),
        encode_job(model, where),
        merge_job(model, where),
        apply_job(model, workload.sft, where, target),
        apply_job(model, workload.grpo, where, target),
    ]
    if workload.grpo.objective.needs_reference:
        found.insert(1, reference_job(model, workload.grpo, where, target))
    return found


def _improved(plan: Plan, say: Callable[[str], None]) -> Plan:
    """GRPO, where nearly all time goes, chooses the policy; SFT then chooses its rows."""
    target, workload = plan.target, plan.workload
    grpo = choose(workload, "grpo", target, say)
    if grpo.taken is None:
        return replace(plan, choices=(grpo,))
    proposed = changed(workload, "grpo", grpo.taken)
    sft = choose(proposed, "sft", target, say, policies=(grpo.taken.remat,))
    if sft.taken is None:
        return replace(plan, choices=(grpo, sft))
    proposed = changed(proposed, "sft", sft.taken)
    programs = dict(plan.programs)
    if target.devices:
        again = []
        for stage, taken in (("grpo", grpo.taken), ("sft", sft.taken)):
            if taken != Candidate(workload.model.remat, getattr(workload, stage).rows):
                again.append(micro_job(proposed.model, getattr(proposed, stage), places(target), target))
        programs |= compile_all(again, target, say)
        if grpo.taken.rows != workload.grpo.rows:
            # Compiled for other rows; it needs less than the gradients do, and is estimated.
            programs.pop("grpo reference", None)
    return replace(
        plan,
        choices=(grpo, sft),
        proposed=proposed,
        proposed_phases=tuple(phases(proposed, programs, target)),
        proposed_times=times(proposed, target.device, target.count),
    )
