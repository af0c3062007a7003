"""Peak memory of one device in every phase of a run: what stays there all along, and what the phase's program adds.

What stays is arithmetic (the arrays a stage holds are known); what a program adds is the compiler's plan for it, or
where nothing could be compiled an estimate of the arrays that it makes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp

from vlmalign.models.model import Model
from vlmalign.models.sizes import cache_bytes
from vlmalign.planning.batches import Where, places, prompt_batch, size, split, trained_in, update_batch, used, whole
from vlmalign.planning.jobs import changed_names, moments
from vlmalign.planning.programs import Program
from vlmalign.planning.target import Target
from vlmalign.planning.workload import CHUNK, Sampled, Update, Workload
from vlmalign.types import Layout

#: of a device's memory, kept for what no plan sees: the driver's context, libraries' workspaces, gaps between arrays
MARGIN = 0.10
#: tokens whose logits exist at once (`objectives.logprobs.token_logprobs`)
HEAD_CHUNK = 1024


class Phase(NamedTuple):
    """Bytes on one device at the height of a phase."""

    name: str
    parameters: int  #: the base, and during a rollout the merged copy
    adapter: int  #: trained parameters, the reference's, gradients
    optimiser: int
    cache: int  #: keys and values
    working: int  #: all else: batch, activations, logits
    how: str  #: of `working`: "compiled", from which it was drawn out or scaled, or "arithmetic"

    @property
    def peak(self) -> int:
        return self.parameters + self.adapter + self.optimiser + self.cache + self.working


def usable(memory: int) -> int:
    """Of a device's memory, what may be planned with."""
    return round(memory * (1 - MARGIN))


def phases(workload: Workload, programs: Mapping[str, Program], target: Target) -> list[Phase]:
    """Every phase of the run, in its order; what a program needs is estimated where it is not among `programs`."""
    model, shares = workload.model, target.row_shares
    where = places(target, model)
    frozen, adapter = (size(where.trained(part)) for part in split(model))
    found = []
    if workload.encodes:
        found.append(_phase("encode", Held(size(where.trained(whole(model)))), programs, _encoding(model)))
    for update in workload.stages:
        # The reference is kept in the dtypes of the model, by which an adapter's are float32.
        reference = size(where.trained(used(model))) if update.objective.needs_reference else 0
        trained = size(where.trained(trained_in(model, update)))
        held = Held(frozen, trained + reference, size(moments(model, update, where)))
        if update.rollout is not None:
            found += _rollout(update.name, update.rollout, model, held, programs, target)
        batch = size(update_batch(model, update)) // shares
        if reference:
            found.append(
                _phase(f"{update.name} reference", held, programs, batch + _scoring(model, update, shares), batch)
            )
        summed = held._replace(adapter=held.adapter + trained)
        found.append(
            _phase(f"{update.name} gradients", summed, programs, batch + _training(model, update, where, shares), batch)
        )
        found.append(_phase(f"{update.name} optimiser", summed, programs, trained))
    if workload.evaluation:  # the one with the largest caches stands for all
        largest = max(workload.evaluation, key=lambda e: e.rows * (e.prompt + e.group * e.completion))
        held = Held(frozen, adapter) if workload.stages else None
        found += _rollout("answers", largest, model, held, programs, target)
    return found


class Held(NamedTuple):
    """What stays on every device throughout a phase: its columns in `Phase`."""

    parameters: int
    adapter: int = 0
    optimiser: int = 0
    cache: int = 0


def _phase(name: str, held: Held, programs: Mapping[str, Program], estimate: int, batch: int = 0) -> Phase:
    if name not in programs:
        return Phase(name, *held, estimate, "arithmetic")
    return Phase(name, *held, batch + programs[name].memory.beyond, programs[name].how)


def _rollout(
    name: str, sampled: Sampled, model: Model, held: Held | None, programs: Mapping[str, Program], target: Target
) -> list[Phase]:
    """The adapter is merged into a copy of every weight; then prompts and completions have their caches. `held` None: of a
    model that is not trained, which is read as it is."""
    where, count, tensor = places(target, model), target.sampling_shares, target.sampling_axes.tensor
    if held is None:
        held, found = Held(size(where.sampled(whole(model)))), []
    else:
        held, found = _merging(name, model, held, programs, target)
    rows, item = -(-sampled.rows // count), jnp.dtype(model.dtype).itemsize
    # Heads are cut between devices and never across: what does not divide is whole on each.
    kv = cache_bytes(model) // (tensor if model.config.decoder.kv_heads % tensor == 0 else 1)
    prompts, own = rows * sampled.prompt * kv, rows * sampled.group * sampled.completion * kv
    batch = size(prompt_batch(model, rows=sampled.rows, prompt=sampled.prompt, images=sampled.lengths.images)) // count
    some = rows if count > 1 else max(1, rows // 4)
    prefill = some * (
        sampled.prompt * kv + _scores(model, Layout(sampled.prompt, 0, 0)) + _wide(model, sampled.prompt) * item
    )
    logits = rows * sampled.group * model.config.decoder.vocab * 4

    def phase(part: str, cache: int, estimate: int, batch: int = 0) -> Phase:
        made = _phase(f"{sampled.name} {part}", held._replace(cache=cache), programs, estimate, batch)
        return made._replace(name=f"{name} {part}")

    return [
        *found,
        phase("prefill", prompts, batch + prefill, batch),
        phase("decode", prompts + own, 3 * logits),
    ]


def _merging(
    name: str, model: Model, held: Held, programs: Mapping[str, Program], target: Target
) -> tuple[Held, list[Phase]]:
    """What is held once the adapter is merged, and the phase of merging."""
    where, shapes = places(target, model), whole(model)
    merged = size(where.trained({name: shapes[name] for name in changed_names(model)}))
    if "merge" in programs:
        merged = programs["merge"].memory.outputs
    phase, copy = _phase("merge", held, programs, merged)._replace(name=f"{name} merge"), merged
    if target.mesh is not None and (target.axes.fsdp, target.sampling_axes.tensor) != (1, 1):
        # What training has cut is brought to where rollouts read it, the shares that it is brought from beside it.
        copy = size(where.sampled(shapes))
        phase = phase._replace(parameters=phase.parameters + copy)
    return held._replace(parameters=held.parameters + copy), [phase]


# ---------------------------------------------------------------- estimates, for want of a compiler: rough


def _encoding(model: Model) -> int:
    """Pixels, one layer's states, and every score of one layer, as where cuDNN's attention is not to be had."""
    vision = model.config.vision
    patches, item = vision.grid**2, jnp.dtype(model.dtype).itemsize
    pixels = vision.channels * vision.image_size**2 * 4
    states = patches * (4 * vision.embed + vision.ffn) * item
    return CHUNK * (pixels + states + vision.heads * patches**2 * (4 + item))


def _scoring(model: Model, update: Update, shares: int) -> int:
    item = jnp.dtype(model.dtype).itemsize
    rows = -(-update.rows // shares)
    return rows * (_wide(model, update.layout.row) * item + _scores(model, update.layout)) + _head(model)


def _training(model: Model, update: Update, where: Where, shares: int) -> int:
    """What the forward pass leaves for the backward pass, one layer at work, and one chunk of logits with its gradient."""
    config, layout, item = model.config.decoder, update.layout, jnp.dtype(model.dtype).itemsize
    rows, layers = -(-update.rows // shares), len(config.layers)
    kept = _kept(model, layout.row) * item + (_scores(model, layout) if model.remat == "none" else 0)
    at_work = 2 * (_wide(model, layout.row) * item + _scores(model, layout))
    # A whole decoder that is trained is used in the model's dtype, and its gradient is there before it is added up.
    whole = 0 if model.lora is not None else 2 * size(where.trained(used(model)))
    return rows * (layers * kept + at_work) + 2 * _head(model) + whole


def _kept(model: Model, tokens: int) -> int:
    """Numbers that one layer leaves of `tokens` tokens for the backward pass, scores aside (`models.decoder.REMAT`)."""
    config = model.config.decoder
    attended = config.heads * config.head_dim
    products = attended + 2 * config.kv_heads * config.head_dim + 2 * config.ffn + 2 * config.embed
    more = {"full": 0, "attention": attended, "dots": attended + products}
    return _wide(model, tokens) if model.remat == "none" else tokens * (config.embed + more[model.remat])


def _wide(model: Model, tokens: int) -> int:
    """Numbers that one layer's forward pass makes of `tokens` tokens, scores aside."""
    config = model.config.decoder
    return tokens * (6 * config.embed + 2 * config.head_dim * (config.heads + config.kv_heads) + 4 * config.ffn)


def _scores(model: Model, layout: Layout) -> int:
    """Bytes of one layer's attention weights over one row, float32 and once more in the model's dtype."""
    prompt, group, completion = layout
    pairs = prompt**2 + group * completion * (prompt + completion)
    return model.config.decoder.heads * pairs * (4 + jnp.dtype(model.dtype).itemsize)


def _head(model: Model) -> int:
    return HEAD_CHUNK * model.config.decoder.vocab * 4
