"""Which rows of a micro-batch and which rematerialisation to take: the fastest that fits.

Keeping activations is faster than making them again, and more rows at once are never slower, so the candidates have an
order, and the first that fits is taken. For a GPU that is not here a candidate is compiled at two small depths and
drawn out to the whole (`depth`); for a GPU that is here, what is tried is compiled as it will run. After one candidate of
a policy was compiled, of either stage, arithmetic scaled to it says of the others which fit with room to spare, and which
are not worth compiling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from vlmalign.models.decoder import REMAT
from vlmalign.models.model import Model
from vlmalign.planning.batches import size, update_batch
from vlmalign.planning.cost import FORWARD_AGAIN
from vlmalign.planning.depth import draw_out, shallow_jobs
from vlmalign.planning.devices import THIS
from vlmalign.planning.hlo import Findings
from vlmalign.planning.jobs import made_by, micro_job
from vlmalign.planning.memory import phases, usable
from vlmalign.planning.programs import Memory, Program, compile_all
from vlmalign.planning.target import Target
from vlmalign.planning.workload import Update, Workload

#: estimates above this many times the limit are believed without compiling: those of arithmetic alone are rough, but not
#: by half; those scaled to a compiled program of the same policy are near it (between SFT and GRPO of ChexReason, on one
#: A100 or eight H100, scales of the four policies differ by 0 to 9 %)
BEYOND, BEYOND_SCALED = 2.0, 1.1
#: and scaled ones below this share of the limit, but for devices that are here
CLEAR = 0.8
SCALED = "arithmetic scaled to what was compiled"


class Candidate(NamedTuple):
    remat: str
    rows: int  #: of a micro-batch, on all devices together


class Tried(NamedTuple):
    """A candidate and the peak of its gradients' phase, in bytes on one device."""

    candidate: Candidate
    peak: int
    fits: bool
    how: str  #: "drawn out from 2 and 4 layers", "compiled", "arithmetic", "arithmetic scaled to what was compiled"


@dataclass(frozen=True)
class Choice:
    """`taken` None: nothing fits, not even one row on each device with everything made again."""

    stage: str
    taken: Candidate | None
    tried: tuple[Tried, ...]
    program: Program | None = None  #: of the gradients with what was taken; where `how` is `SCALED`, its memory alone
    scale: float | None = None  #: what was compiled took, in estimates of it


def rows_to_try(update: Update, shares: int) -> Iterator[int]:
    """Most first: halved from the whole optimiser batch to one row in each of `shares`."""
    rows = -(-update.groups // shares)
    yield rows * shares
    while rows > 1:
        rows = -(-rows // 2)
        yield rows * shares


def changed(workload: Workload, stage: str, candidate: Candidate) -> Workload:
    """The workload with this choice for the update of this name."""
    stages = tuple(replace(each, rows=candidate.rows) if each.name == stage else each for each in workload.stages)
    return replace(workload, model=_with_remat(workload.model, candidate.remat), stages=stages)


@cache
def _with_remat(model: Model, remat: str) -> Model:
    return replace(model, remat=remat)


def choose_all(
    workload: Workload,
    target: Target,
    say: Callable[[str], None],
    *,
    policies: Iterable[str] = REMAT,
    stated: bool = False,
    programs: Mapping[str, Program] = {},
) -> tuple[Workload | None, tuple[Choice, ...]]:
    """The workload with the fastest policy under which every update has rows that fit, None where none has; and all that
    was tried. The last update, where most time goes, chooses first. `stated`: rows that the config states stand.

    `programs` are those of the workload as it is.
    """
    tried: list[Choice] = []
    for remat in sorted(policies, key=FORWARD_AGAIN.__getitem__):
        found, scale = workload, None
        for update in reversed(workload.stages):
            program = programs.get(f"{update.name} gradients")
            known = {} if program is None else {Candidate(workload.model.remat, update.rows): program}
            rows = update.rows if stated and not update.open_rows else None
            choice = choose_rows(found, update.name, remat, target, say, rows=rows, known=known, scale=scale)
            tried.append(choice)
            if choice.taken is None:
                break
            found, scale = changed(found, update.name, choice.taken), choice.scale
        else:
            return found, tuple(tried)
    return None, tuple(tried)


def choose_rows(
    workload: Workload,
    stage: str,
    remat: str,
    target: Target,
    say: Callable[[str], None],
    *,
    rows: int | None = None,
    known: Mapping[Candidate, Program] = {},
    scale: float | None = None,
) -> Choice:
    """The most rows of this stage, under this policy, whose gradients fit; `rows`: so many, neither more nor fewer.

    `known` are programs of gradients that need not be compiled again, `scale` is that of another stage's choice.
    """
    tried: list[Tried] = []
    limit = usable(target.device.memory)
    for candidate, program in known.items():
        if candidate.remat == remat:
            scale = _scale(workload, stage, candidate, target, program)
    for number in rows_to_try(workload[stage], target.row_shares) if rows is None else [rows]:
        candidate = Candidate(remat, number)
        work, program = changed(workload, stage, candidate), known.get(candidate)
        held, rough = _estimate(work, stage, target)
        peak, beyond, how = held + rough, BEYOND, "arithmetic"
        if scale is not None:
            peak, beyond, how = held + round(rough * scale), BEYOND_SCALED, SCALED
            if program is None and peak <= CLEAR * limit and target.device.name != THIS:
                memory, nothing = Memory(0, 0, peak - held, 0), Findings((), (), {}, 0)
                program = Program(f"{stage} gradients", memory, nothing, 0.0, how=SCALED)
        if program is None and target.devices and peak <= beyond * limit:
            program = _compiled(work, stage, target)
            scale = _scale(workload, stage, candidate, target, program)
        if program is not None:
            peak, how = held + program.memory.beyond, program.how
        tried.append(Tried(candidate, peak, peak <= limit, how))
        say(f"tried {stage} remat {remat}, {number} rows: {peak / 2**30:.1f} GiB ({how})")
        if tried[-1].fits:
            return Choice(stage, candidate, tuple(tried), program, scale)
    return Choice(stage, None, tuple(tried), scale=scale)


def _estimate(workload: Workload, stage: str, target: Target) -> tuple[int, int]:
    """Bytes of gradients that stay or are arguments, which is exact, and what the program adds, estimated."""
    (phase,) = (p for p in phases(workload, {}, target) if p.name == f"{stage} gradients")
    held = phase.peak - phase.working + size(update_batch(workload.model, workload[stage])) // target.row_shares
    return held, phase.peak - held


def _scale(workload: Workload, stage: str, candidate: Candidate, target: Target, program: Program) -> float:
    """What the compiled program adds, in estimates of it."""
    return program.memory.beyond / _estimate(changed(workload, stage, candidate), stage, target)[1]


def _compiled(workload: Workload, stage: str, target: Target) -> Program:
    make = made_by(micro_job, workload[stage], target)
    here = target.device.name == THIS and target.devices[0].platform != "cpu"
    jobs = [make(workload.model)] if here else shallow_jobs(make, workload.model)
    found = compile_all(jobs, target, lambda text: None)
    return draw_out(f"{stage} gradients", [found[job.name] for job in jobs], workload.model)
