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


class Times(NamedTuple):
    """Ideal seconds; real ones are these over the share of the peak that is reached."""

    parts: tuple[Part, ...]
    sft_step: float  #: of the stage that learns from answers; 0 where there is none
    sft_epoch: float  #: one pass of it over its data; 0 where the config does not say how many there are
    grpo_step: float
    epoch: float  #: one pass of GRPO over its prompts
    total: float

    def hours(self, count: int, share: float) -> float:
        """GPU-hours at this share of the roofline."""
        return self.total * count / share / 3600


def times(workload: Workload, device: Device, count: int) -> Times:
    """Work is shared out evenly; what crosses the links between devices is left out (adapters' gradients are small)."""
    model, dtype = workload.model, workload.model.dtype
    parts: list[Part] = []

    def add(name: str, pieces: list[Cost], often: float) -> float:
        seconds = sum(roofline(piece, device, dtype) for piece in pieces)
        parts.append(Part(name, sum(pieces, Cost(0.0, 0.0)), seconds, often))
        return seconds

    def trained(update: Update) -> Cost:
        return cost.gradients(model, update, update.rows / count).times(update.micro_batches)

    def scored(update: Update) -> Cost:
        return cost.forward(model, update.layout, update.rows / count, head=True).times(update.micro_batches)

    def sampled(work: Sampled) -> list[Cost]:
        made = Generator(base_of(model), None, (), work.rows, work.group, work.completion, work.sampling)
        length = min(workload.lengths.completion, work.completion)
        found = cost.rollout(model, work, made, rows=work.rows / count, length=length)
        return [piece.times(-(-work.prompts // work.rows)) for piece in found]

    sft, grpo = workload.sft, workload.grpo
    if model.config.vision is not None and workload.films:
        add("encode a film", [cost.encode(model, 1 / count)], workload.films)
    sft_step = add(f"{sft.name.upper()} gradients", [trained(sft)], sft.steps) if sft is not None else 0.0
    sft_epoch = workload.sft_epoch * sft_step
    if grpo is None:
        return Times(tuple(parts), sft_step, sft_epoch, 0.0, 0.0, sum(part.seconds * part.times for part in parts))
    before = len(parts)
    assert workload.rollout is not None
    rollouts = workload.rollout.count
    prefill, decode = sampled(workload.rollout)
    add("rollout prefill", [prefill], rollouts)
    add("rollout decode", [decode], rollouts)
    if grpo.objective.needs_reference:
        # Where the policy scores first, the reference is recorded then, once per rollout.
        add("GRPO reference", [scored(grpo)], rollouts if workload.scores_first else grpo.steps)
    if workload.scores_first:
        add("GRPO scores of the policy", [scored(grpo)], rollouts)
    add("GRPO gradients", [trained(grpo)], grpo.steps)
    # Per step: a rollout may serve several.
    grpo_step = sum(part.seconds * part.times for part in parts[before:]) / grpo.steps
    for work in workload.evaluation:
        add(f"{work.name}: films", [cost.encode(model, work.prompts / count)], 1)
        add(f"{work.name}: answers", sampled(work), work.count)
    total = sum(part.seconds * part.times for part in parts)
    return Times(tuple(parts), sft_step, sft_epoch, grpo_step, workload.epoch * grpo_step, total)
