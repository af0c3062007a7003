"""Run by test_sharded.py in a process with eight devices: training and sampling on meshes beside one device, as JSON.

    sharded_program.py few     an adapter, of text
    sharded_program.py rest    with the few, every pair of objective, input, kind of trained parameters and mesh; dropout, replicas
    sharded_program.py rollouts    sampling

The head runs over five tokens at a time, so that the loop over chunks is there on every device; the second micro-batch
is half padding.
"""

import json
import re
import sys
from functools import cache, partial
from unittest.mock import patch

import conftest  # noqa: F401  (the tests' settings and shape checks)
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tiny_checkpoints import QUICK, group, put, random_adapter, read, text_model, vlm, write

from vlmalign.mesh import TENSOR, MeshSettings, Placement, build_mesh, placement, put_batch, reshard
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.objectives.logprobs import token_logprobs
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.rollout.engine import generate
from vlmalign.rollout.sampling import Sampling
from vlmalign.training import step
from vlmalign.training.preference import preference_objective
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.types import GroupBatch, Layout

GRPO = GrpoSettings(clip_low=0.1, clip_high=0.2, beta=0.2, max_completion=6)
OBJECTIVES = {
    "sft": Objective("sft", sft_loss, sft_counts),
    "sft dropout": Objective("sft", sft_loss, sft_counts, dropout=True),
    "dpo": preference_objective(DpoSettings(), recorded=False),
    "grpo": Objective(
        "grpo", partial(grpo_loss, settings=GRPO), partial(grpo_counts, settings=GRPO), needs_reference=True
    ),
}
MESHES = {
    "data 8": MeshSettings(),
    "fsdp 8": MeshSettings(data=1, fsdp=8),
    "data 2 fsdp 2 tensor 2": MeshSettings(data=2, fsdp=2, tensor=2),
    "replicas 2 data 4": MeshSettings(replicas=2, data=4),
}
#: optimiser -> (updates, what it is). AdamW divides a gradient by its size: one of 1e-8, which is rounding beside others
#: of 1, would move its parameter by the learning rate this way or that, whatever the mesh. Such are left to `eps`.
OPTIMISERS = {"sgd": (1, optax.sgd(0.5)), "adamw": (5, optax.adamw(1e-4, eps=1e-6))}
TEXT_ADAPTER = ("sft", "text", "lora", "data 8", "adamw")
IMAGE_ADAPTER = ("dpo", "image", "lora", "data 8", "sgd")
TEXT_WHOLE = ("dpo", "text", "all", "fsdp 8", "adamw")
CASES = {
    "few": [TEXT_ADAPTER],
    "rest": [
        TEXT_WHOLE,
        IMAGE_ADAPTER,
        ("grpo", "text", "all", "data 2 fsdp 2 tensor 2", "adamw"),
        ("sft", "image", "all", "fsdp 8", "sgd"),
        ("sft", "text", "all", "data 2 fsdp 2 tensor 2", "adamw"),
        ("dpo", "image", "lora", "data 2 fsdp 2 tensor 2", "sgd"),
        ("grpo", "text", "lora", "fsdp 8", "sgd"),
        ("grpo", "image", "all", "data 8", "sgd"),
        ("sft", "text", "lora", "replicas 2 data 4", "adamw"),
        ("sft dropout", "text", "lora dropout", "data 8", "adamw"),
    ],
}


@cache
def checkpoint(kind: str):
    if kind == "image":
        return vlm()
    module = text_model(5, num_hidden_layers=1, layer_types=["sliding_attention"], num_key_value_heads=2)
    return read(write(module, "one-layer"), module)


@cache
def model(kind: str, trained: str) -> Model:
    if trained == "all":
        return checkpoint(kind).model
    rate = 0.1 if trained == "lora dropout" else 0.0
    return Model(checkpoint(kind).model.config, lora=LoraSpec(rank=2, alpha=4.0, dropout=rate))


def parameters(kind: str, trained: str):
    """(trained, frozen); the trained ones are donated, so they are copies."""
    base = checkpoint(kind).params
    if trained == "all":
        return jax.tree.map(jnp.array, dict(base)), {}
    adapter = random_adapter(model(kind, trained), seed=1)
    return {name: 0.3 * value for name, value in adapter.items()}, base


def where(kind: str, trained: str, mesh: str, **options) -> Placement:
    config = model(kind, trained).config.decoder
    pieces = {"heads": config.heads, "kv_heads": config.kv_heads}
    own = model(kind, trained)
    return placement(build_mesh(MESHES[mesh]), own.shapes, own.dims, pieces=pieces, **options)


@cache
def micro_batches(objective: str, kind: str, trained: str) -> tuple[MicroBatch, ...]:
    """Eight groups and four, all of different lengths, each with an image where there are any."""
    rng = np.random.default_rng(0)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(3, 90, int(rng.integers(low, high + 1))).tolist()

    k = 1 if objective.startswith("sft") else 2
    shown = ["abcdefgh"[i % 8] for i in range(12)] if kind == "image" else []
    groups = [
        group(i, words(1, 4) + shown[i : i + 1] + words(1, 4), *(words(1, 6) for _ in range(k))) for i in range(12)
    ]
    found = []
    for part in (groups[:8], groups[8:]):
        batch = put(part, Layout(16, k, 6), rows=8, images=8 if kind == "image" else None)
        if kind == "image" and trained == "lora":  # the tower is frozen: its features come with the batch
            features = jax.jit(checkpoint(kind).model.encode)(checkpoint(kind).params, batch.pixels)
            batch = batch._replace(pixels=None, features=np.asarray(features))
        recorded = {}
        if objective == "grpo":
            batch = batch._replace(advantage=rng.normal(size=batch.weight.shape[:2]).astype(np.float32))
            known = trainer(objective, kind, trained, "sgd", None).scores(*parameters(kind, trained), batch)
            noise = 0.1 * rng.normal(size=batch.weight.shape)
            recorded = {"old_logp": (np.asarray(known.logp) + noise).astype(np.float32)}
        found.append(MicroBatch(batch, recorded))
    return tuple(found)


@cache
def trainer(objective: str, kind: str, trained: str, optimiser: str, mesh: str | None) -> Trainer:
    reference = None
    if not objective.startswith("sft"):
        reference = (model(kind, "all"), {} if trained == "lora" else dict(checkpoint(kind).params))
    with patch.object(jax, "jit", partial(jax.jit, compiler_options=QUICK)):
        return Trainer(
            model(kind, trained),
            OBJECTIVES[objective],
            optax.chain(optax.trace(0.0), OPTIMISERS[optimiser][1]),  # the first keeps the gradients
            reference=reference,
            placement=None if mesh is None else where(kind, trained, mesh),
        )


def steps(own: Trainer, objective: str, kind: str, trained: str, optimiser: str):
    """(metrics and gradients of the first update, parameters after the last, bytes of state on the first device)."""
    params, frozen = parameters(kind, trained)
    if own.placement is not None:
        frozen = reshard(frozen, own.placement)
    state, first = own.init(params), None
    for _ in range(OPTIMISERS[optimiser][0]):
        state, metrics = own.step(state, frozen, micro_batches(objective, kind, trained))
        first = first or jax.device_get((metrics, state.opt_state[0].trace))
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves((state.params, state.opt_state)))
    return *first, jax.device_get(state.params), held


reference_steps = cache(lambda *case: steps(trainer(*case, None), *case))


def gap(found, expected) -> float:
    """max|a - b| / max(1, max|b|), over the largest of all arrays."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    # NumPy's maximum: Python's would pass over what is not a number.
    return float(
        np.max([np.max(np.abs(np.asarray(a, np.float64) - b)) / np.maximum(1.0, np.max(np.abs(b))) for a, b in pairs])
    )


def compare(objective: str, kind: str, trained: str, mesh: str, optimiser: str) -> dict:
    case = (objective, kind, trained, optimiser)
    own = trainer(*case, mesh)
    metrics, gradients, params, held = steps(own, *case)
    known, expected, after, whole = reference_steps(*case)
    assert gradients.keys() == expected.keys()
    start, _ = parameters(kind, trained)
    return {
        "case": [objective, kind, trained, mesh, optimiser],
        "metrics": gap(metrics, known),
        "gradients": gap(gradients, expected),
        "parameters": gap(params, after),
        "moved": max(float(np.max(np.abs(after[name] - start[name]))) for name in after),
        "gradient_size": float(known.grad_norm),
        "loss": float(known.loss),
        "share_of_state": held / whole,
    }


COLLECTIVE = re.compile(
    r" = (\(?[^()]*\)?) (all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
)


def collectives(text: str) -> list[list]:
    """[operation, [shape, ...]] of every collective of a compiled program."""
    found = []
    for kinds, operation in COLLECTIVE.findall(re.sub(r"/\*.*?\*/", "", text)):
        shapes = [[int(n) for n in dims.split(",") if n] for dims in re.findall(r"\w+\[([\d,]*)\]", kinds)]
        found.append([operation, shapes])
    assert len(found) == len(re.findall(rf" (?:{'|'.join(OPERATIONS)})(?:-start)?\(", text)), "a collective was missed"
    return found


OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")


def training_collectives(objective: str, kind: str, trained: str, mesh: str, optimiser: str) -> list[list]:
    own = trainer(objective, kind, trained, optimiser, mesh)
    params, frozen = parameters(kind, trained)
    state, frozen = own.init(params), reshard(frozen, own.placement)
    batches = micro_batches(objective, kind, trained)
    batch = next(own._placed(batches, frozen))
    known = own._with_reference(batch, frozen)
    counts = own.objective.counts([b.groups for b in batches])
    grads = jax.tree.map(jnp.zeros_like, state.params)
    with jax.set_mesh(own.mesh):
        program = own._accumulate.__wrapped__.lower(
            grads, state.params, frozen, batch.groups, known, counts, state.step
        )
        return collectives(program.compile().as_text())


SAMPLE = {"group": 3, "completion": 6, "stop_ids": (1, 2, 3, 4, 5), "sampling": Sampling(temperature=0.8, top_p=0.9)}


def prompts() -> GroupBatch:
    rng = np.random.default_rng(3)
    items = [group(70 + i, rng.integers(6, 90, 1 + i).tolist()) for i in range(8)]
    return put(items, Layout(8, 0, 0), images=None)


def sample(params, batch: GroupBatch):
    return jax.device_get(
        generate(checkpoint("text").model, params, batch, jax.random.key(0), first_sample=np.int32(0), **SAMPLE)
    )


def rollout(mesh: MeshSettings, over: tuple[str, ...], start: Placement) -> dict:
    """Samples on this mesh of parameters that training left on another."""
    own, base = checkpoint("text").model, checkpoint("text").params
    config = own.config.decoder
    pieces = {"heads": config.heads, "kv_heads": config.kv_heads}
    place = placement(build_mesh(mesh), own.shapes, own.dims, over=over, pieces=pieces)
    params, batch = reshard(reshard(base, start), place), put_batch(prompts(), place.mesh)
    lowered = generate.lower(own, params, batch, jax.random.key(0), first_sample=np.int32(0), **SAMPLE)
    found, expected = sample(params, batch), sample(base, prompts())
    return {
        "same": [
            bool(np.array_equal(getattr(found, n), getattr(expected, n))) for n in ("tokens", "length", "stopped")
        ],
        "logp": gap((found.logp, found.kept_logp), (expected.logp, expected.kept_logp)),
        "different": len({row.tobytes() for row in expected.tokens.reshape(-1, 6)}),
        "collectives": collectives(lowered.compile().as_text()),
        "cut": sum(any(value.sharding.spec) for value in params.values()),
    }


def error(call) -> str:
    try:
        call()
    except ValueError as found:
        return str(found)
    return ""


def refusals() -> dict[str, str]:
    own = trainer(*TEXT_ADAPTER[:3], "adamw", "data 8")
    params, frozen = parameters("text", "lora")
    batch = put([group(0, [3, 4], [5])], Layout(16, 1, 6), rows=4, images=None)
    placed = reshard(frozen, own.placement)
    return {
        "rows": error(lambda: own.step(own.init(params), placed, [MicroBatch(batch, {})])),
        "frozen": error(lambda: own.step(own.init(parameters("text", "lora")[0]), frozen, [MicroBatch(batch, {})])),
    }


def adapter_traffic(case: tuple) -> dict:
    """What training an adapter sends between devices, beside the shapes of the adapter."""
    kind = case[1]
    return {
        "collectives": training_collectives(*case),
        "adapter": [list(x.shape) for x in parameters(kind, "lora")[0].values()],
    }


def fsdp_traffic() -> dict:
    fsdp, shapes = where("text", "all", "fsdp 8"), model("text", "all").shapes
    return {
        "collectives": training_collectives(*TEXT_WHOLE),
        "cut": [list(shapes[name].shape) for name, place in fsdp.shardings.items() if any(place.spec)],
        "parameters": [list(x.shape) for x in shapes.values()],
    }


def rollouts() -> dict:
    fsdp = where("text", "all", "fsdp 8")
    return {
        "whole": rollout(MeshSettings(), (), fsdp),
        "tensor": rollout(MeshSettings(data=4, tensor=2), (TENSOR,), fsdp),
        "parameters": [list(x.shape) for x in model("text", "all").shapes.values()],
    }


def main(which: str) -> None:
    step.token_logprobs = partial(token_logprobs, chunk=5)
    assert jax.device_count() == 8
    if which == "rollouts":
        print(json.dumps(rollouts()))
        return
    found = {"cases": [compare(*case) for case in CASES[which]]}
    if which == "few":
        found |= {"adapter": adapter_traffic(TEXT_ADAPTER), "refusals": refusals()}
    else:
        found |= {"adapter": adapter_traffic(IMAGE_ADAPTER), "fsdp": fsdp_traffic()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
