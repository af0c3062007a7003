"""Which rows of a micro-batch and which rematerialisation to take: the fastest that fits.

Keeping activations is faster than making them again, and more rows at once are never slower, so the candidates have an
order, and the first that fits is taken. Memory grows by the same amount with every layer: a candidate is compiled
at two small depths and drawn out to the whole; what is taken is then compiled whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

from vlmalign.models.decoder import REMAT
from vlmalign.models.model import Model
from vlmalign.planning.batches import places, size, update_batch
from vlmalign.planning.cost import FORWARD_AGAIN
from vlmalign.planning.jobs import micro_job
from vlmalign.planning.memory import phases, usable
from vlmalign.planning.programs import compile_all
from vlmalign.planning.target import Target
from vlmalign.planning.workload import Update, Workload

#: layers of the models that stand for the whole one
DEPTHS = (2, 4)


class Candidate(NamedTuple):
    remat: str
    rows: int  #: of a micro-batch, on all devices together


class Tried(NamedTuple):
    """A candidate and the peak of its gradients' phase, in bytes on one device."""

    candidate: Candidate
    peak: int
    fits: bool
    how: str  #: "drawn out from 2 and 4 layers", "compiled", "arithmetic"


@dataclass(frozen=True)
class Choice:
    """`taken` None: nothing fits, not even one row on each device with everything made again."""

    stage: str
    taken: Candidate | None
    tried: tuple[Tried, ...]


def candidates(update: Update, count: int, policies: tuple[str, ...], rows: int | None = None) -> Iterator[Candidate]:
    """Fastest first: by operations, then by rows, halved from the whole optimiser batch to one row per device.

    With `rows`, these alone.
    """
    if rows is not None:
        yield from (Candidate(remat, rows) for remat in sorted(policies, key=FORWARD_AGAIN.__getitem__))
        return
    for remat in sorted(policies, key=FORWARD_AGAIN.__getitem__):
        rows = -(-update.groups // count)
        while True:
            yield Candidate(remat, rows * count)
            if rows == 1:
                break
            rows = -(-rows // 2)


def changed(workload: Workload, stage: str, candidate: Candidate) -> Workload:
    """The workload with this choice for `stage`, "sft" or "grpo"."""
    update: Update = getattr(workload, stage)
    model = _with_remat(workload.model, candidate.remat)
    return replace(workload, model=model, **{stage: replace(update, rows=candidate.rows)})


def stage_of(update: Update, workload: Workload) -> str:
    """The field of the workload that this update stands in."""
    return "sft" if update is workload.sft else "grpo"


@cache
def _with_remat(model: Model, remat: str) -> Model:
    return replace(model, remat=remat)


def choose_rows(
    workload: Workload,
    stage: str,
    target: Target,
    say: Callable[[str], None],
    *,
    policies: tuple[str, ...] = tuple(REMAT),
    rows: int | None = None,
) -> Choice:
    """The fastest candidate of this stage whose gradients fit; `rows`: with so many, neither more nor fewer."""
    tried: list[Tried] = []
    limit = usable(target.device.memory)
    for candidate in candidates(getattr(workload, stage), target.count, policies, rows):
        found = _try(changed(workload, stage, candidate), stage, candidate, target, limit)
        tried.append(found)
        say(f"tried {stage} remat {candidate.remat}, {candidate.rows} rows: {found.peak / 2**30:.1f} GiB ({found.how})")
        if found.fits:
            return Choice(stage, candidate, tuple(tried))
    return Choice(stage, None, tuple(tried))


def _try(workload: Workload, stage: str, candidate: Candidate, target: Target, limit: int) -> Tried:
    update: Update = getattr(workload, stage)
    (phase,) = (p for p in phases(workload, {}, target) if p.name == f"{update.name} gradients")
    # What certainly does not fit is not worth compiling: the estimate is rough, but not by half.
    if not target.devices or phase.peak > 2 * limit:
        return Tried(candidate, phase.peak, phase.peak <= limit, "arithmetic")
    held = phase.peak - phase.working + size(update_batch(workload.model, update)) // target.count
    layers = len(workload.model.config.decoder.layers)
    where, depths = places(target, workload.model), [d for d in DEPTHS if d < layers]
    if len(depths) < len(DEPTHS):
        depths = [layers]
    jobs = [micro_job(shallow(workload.model, d), update, where, target)._replace(name=str(d)) for d in depths]
    needs = [p.memory.beyond for p in compile_all(jobs, target, lambda text: None).values()]
    if len(depths) == 1:
        return Tried(candidate, held + needs[0], held + needs[0] <= limit, "compiled")
    slope = (needs[1] - needs[0]) / (depths[1] - depths[0])
    peak = held + round(needs[1] + slope * (layers - depths[1]))
    return Tried(candidate, peak, peak <= limit, f"drawn out from {depths[0]} and {depths[1]} layers")


def shallow(model: Model, layers: int) -> Model:
    """The first `layers` layers of a model."""
    decoder = replace(model.config.decoder, layers=model.config.decoder.layers[:layers])
    return replace(model, config=replace(model.config, decoder=decoder))
