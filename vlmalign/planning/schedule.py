"""Seconds of a step, an epoch and the whole run by the roofline, on each of `count` devices."""

from __future__ import annotations

from typing import NamedTuple

from vlmalign.planning import cost
from vlmalign.planning.batches import base_of
from vlmalign.planning.cost import Cost, roofline
from vlmalign.planning.devices import Device
from vlmalign.planning.workload import Sampled, Update, Workload
from vlmalign.rollout.completions import Generator


class Part(NamedTuple):
    """One kind of work: what it costs one device each time, and how often it is done."""

    name: str
    cost: Cost
    seconds: float  #: the roofline's, each time
    times: float


class StageTime(NamedTuple):
    """Of stages that are planned as one."""

    stages: tuple[str, ...]
    step: float  #: of a step, its share of the rollout that it learns from included
    epoch: float  #: one pass over its data; 0 where it is not known how many cases there are


class Times(NamedTuple):
    """Ideal seconds; real ones are these over the share of the peak that is reached."""

    parts: tuple[Part, ...]
    stages: tuple[StageTime, ...]
    total: float

    def hours(self, count: int, share: float) -> float:
        """GPU-hours at this share of the roofline."""
        return self.total * count / share / 3600


def times(workload: Workload, device: Device, count: int) -> Times:
    """Work is shared out evenly; what crosses the links between devices is left out (adapters' gradients are small)."""
    model, dtype = workload.model, workload.model.dtype
    parts: list[Part] = []

    def add(name: str, piece: Cost, often: float) -> None:
        parts.append(Part(name, piece, roofline(piece, device, dtype), often))

    def trained(update: Update) -> Cost:
        return cost.gradients(model, update, update.rows / count).times(update.micro_batches)

    def scored(update: Update) -> Cost:
        return cost.forward(model, update.layout, update.rows / count, head=True).times(update.micro_batches)

    def sampled(work: Sampled) -> list[Cost]:
        made = Generator(base_of(model), None, (), work.rows, work.group, work.completion, work.sampling)
        found = cost.rollout(model, work, made, rows=work.rows / count, length=work.lengths.completion)
        return [piece.times(-(-work.prompts // work.rows)) for piece in found]

    if workload.films:
        add("encode a film", cost.encode(model, 1 / count), workload.films)
    stages = []
    for update in workload.stages:
        before, name = len(parts), update.name
        if (rollout := update.rollout) is not None:
            prefill, decode = sampled(rollout)
            add(f"{name} prefill", prefill, rollout.count)
            add(f"{name} decode", decode, rollout.count)
            if update.objective.needs_reference:
                # Where the policy scores first, the reference is recorded then, once per rollout.
                add(f"{name} reference", scored(update), rollout.count if update.scores_first else update.steps)
            if update.scores_first:
                add(f"{name} scores of the policy", scored(update), rollout.count)
        add(f"{name} gradients", trained(update), update.steps)
        # Per step: a rollout may serve several.
        step = sum(part.seconds * part.times for part in parts[before:]) / update.steps
        stages.append(StageTime(update.stages, step, update.epoch * step))
    for work in workload.evaluation:
        if workload.encodes and work.lengths.images:
            add(f"{work.name}: films", cost.encode(model, work.prompts / count), 1)
        prefill, decode = sampled(work)
        add(f"{work.name}: prefill", prefill, work.count)
        add(f"{work.name}: decode", decode, work.count)
    return Times(tuple(parts), tuple(stages), sum(part.seconds * part.times for part in parts))
