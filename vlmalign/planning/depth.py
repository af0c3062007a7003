"""Programs of a deep model, drawn out from the same programs of a model with its first few layers.

A decoder is the same layer over and over: memory, traffic and calls of its programs grow by the same amount with every
layer, while compiling them takes minutes. So they are compiled at two small depths, and what a layer adds is added once
for each layer that is left. Layers that differ (a window here, none there) are taken for alike, and what the compiler
does in deep programs alone is not seen (`record.LIMITS` has a case).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from vlmalign.models.model import Model
from vlmalign.planning.hlo import Findings, Traffic
from vlmalign.planning.jobs import Job
from vlmalign.planning.programs import Memory, Program

#: layers of the models that stand for the whole one
DEPTHS = (2, 4)


def depths_of(model: Model) -> tuple[int, ...]:
    """The depths to compile at: two small ones, or a model's own where it has no more layers than those."""
    layers = len(model.config.decoder.layers)
    return DEPTHS if layers > DEPTHS[-1] else (layers,)


def shallow(model: Model, layers: int) -> Model:
    """The first `layers` layers of a model."""
    decoder = replace(model.config.decoder, layers=model.config.decoder.layers[:layers])
    return replace(model, config=replace(model.config, decoder=decoder))


def shallow_jobs(make: Callable[[Model], Job], model: Model) -> list[Job]:
    """What `make` makes of the model at each of its depths, named "NAME at N layers"; at its own depth, as it is."""
    depths = depths_of(model)
    if len(depths) == 1:
        return [make(model)]
    return [(job := make(shallow(model, depth)))._replace(name=f"{job.name} at {depth} layers") for depth in depths]


def draw_out(name: str, found: Sequence[Program], model: Model) -> Program:
    """The program of the whole model from those of `shallow_jobs`, in their order."""
    if len(found) == 1:
        return replace(found[0], name=name)
    (few, more), (low, high), layers = found, DEPTHS, len(model.config.decoder.layers)

    def drawn(a: int, b: int) -> int:
        return max(0, b + round((b - a) * (layers - high) / (high - low)))

    def traffic(before: Sequence[Traffic], after: Sequence[Traffic]) -> tuple[Traffic, ...]:
        old, new = ({each[:2]: each[2:] for each in part} for part in (before, after))
        places = sorted({*old, *new})
        return tuple(Traffic(*at, *map(drawn, old.get(at, (0, 0)), new.get(at, (0, 0)))) for at in places)

    calls = {
        target: drawn(few.findings.calls.get(target, 0), more.findings.calls.get(target, 0))
        for target in sorted({*few.findings.calls, *more.findings.calls})
    }
    findings = Findings(
        traffic(few.findings.collectives, more.findings.collectives),
        traffic(few.findings.copies, more.findings.copies),
        calls,
        drawn(few.findings.sorts, more.findings.sorts),
    )
    memory = Memory(*map(drawn, few.memory, more.memory))
    how = f"drawn out from {low} and {high} layers"
    return Program(name, memory, findings, few.seconds + more.seconds, how=how)
