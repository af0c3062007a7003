"""Run by test_rollout_mesh.py in a process with eight devices: sampling and encoding on meshes beside one device, as JSON.

mesh_program.py few     samples with rows and weights cut; what decoding sends between devices; Gemma's images
mesh_program.py rest    the other mesh, greedy answers, and images of several sizes
"""

import json
import re
import sys
from dataclasses import replace
from functools import cache

import conftest  # noqa: F401  (the tests' settings and shape checks)
import jax
import numpy as np
from tiny_checkpoints import SOFT_TOKENS, group, pictures, read, text_model, vlm, write
from tiny_families import family

from vlmalign.mesh import MeshSettings, build_mesh, put_rows, reshard, row_shares
from vlmalign.rollout import cache as programs
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.engine import Rows
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.placing import rollout_placement, training_placement
from vlmalign.rollout.sampling import Sampling
from vlmalign.types import Grid, Patches

MESHES = {"data 8": MeshSettings(), "data 4 tensor 2": MeshSettings(tensor=2)}
#: mesh -> how it samples
RUNS = {
    "few": {"data 4 tensor 2": ("sampled",)},
    "rest": {"data 4 tensor 2": ("greedy",), "data 8": ("greedy", "sampled")},
}
SAMPLINGS = {"greedy": Sampling(0.0), "sampled": Sampling(0.8, top_p=0.9)}
KEY = jax.random.key(4)
#: completions of up to 70 tokens: caches grow from 64, and the last ones move into smaller shapes
COMPLETION = 70


#: eight blocks of the sampler's two-level search
VOCAB = 4096


@cache
def checkpoint(vocab: int = 96):
    module = text_model(
        5, num_hidden_layers=1, layer_types=["sliding_attention"], num_key_value_heads=2, vocab_size=vocab
    )
    return read(write(module, f"one-layer-{vocab}"), module)


def prompts():
    rng = np.random.default_rng(3)
    return [group(70 + i, rng.integers(6, 90, 1 + i % 7).tolist()) for i in range(21)]


def generator(model, sampling: Sampling, mesh=None) -> Generator:
    return Generator(
        model, None, (1, 2, 3), rows=16, group=2, completion=COMPLETION, sampling=sampling, multiple=8,
        prompt_lengths=(8,), mesh=mesh,
    )  # fmt: skip


class Compilations:
    """Counts the programs that XLA is asked for."""

    def __init__(self):
        self.names: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self)

    def __call__(self, event: str, seconds: float, **more: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(str(more.get("fun_name")))


SEEN = Compilations()


OPERATIONS = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all|collective-broadcast"


def collectives(text: str) -> list[list]:
    """[operation, [shape, ...]] of every collective of a compiled program."""
    text, found = re.sub(r"/\*.*?\*/", "", text), []
    for kinds, operation in re.findall(rf" = (\(?[^()]*\)?) ({OPERATIONS})(?:-start)?\(", text):
        found.append([operation, [[int(n) for n in d.split(",") if n] for d in re.findall(r"\w+\[([\d,]*)\]", kinds)]])
    assert len(found) == len(re.findall(rf" (?:{OPERATIONS})(?:-start)?\(", text)), "a collective was missed"
    return found


def compared(found, expected) -> dict:
    pairs = [(a, b) for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True)]
    same = [np.array_equal(a.tokens, b.tokens) and a.stopped == b.stopped for a, b in pairs]
    return {
        "same": all(same),
        "completions": len(same),
        "different": len({b.tokens.tobytes() for _, b in pairs}),
        "tokens": sum(len(b.tokens) for _, b in pairs),
        "lengths": len({len(b.tokens) for _, b in pairs}),
        "logp": max(float(np.max(np.abs(a.logp - b.logp))) for a, b in pairs) if all(same) else None,
    }


def sampled(settings: MeshSettings, names: tuple[str, ...]) -> dict:
    """Completions on a mesh, of parameters that fsdp training left cut; and programs compiled after warm-up."""
    own, mesh = checkpoint(), build_mesh(settings)
    start = reshard(own.params, training_placement(own.model, build_mesh(MeshSettings(data=1, fsdp=8))))
    params = reshard(start, rollout_placement(own.model, mesh))
    found = {"cut": sum(any(x.sharding.spec) for x in params.values())}
    for name in names:
        made, stats = generator(own.model, SAMPLINGS[name], mesh), []
        before = len(SEEN.names)
        programs_made = made.warm_up(params)
        decoding = sum("decode_block" in name for name in SEEN.names[before:])
        before = len(SEEN.names)
        answers = made.run(params, prompts(), KEY, report=stats.append)
        made.run(params, prompts()[:5], KEY)
        compiled = len(SEEN.names) - before
        found[name] = {
            **compared(answers, alone(name)),
            "programs": programs_made,
            "compiled": compiled,
            "decode_programs": decoding,
            "moves": stats[0].moves,
        }
    return found


@cache
def alone(name: str):
    """On one device."""
    return generator(checkpoint().model, SAMPLINGS[name]).run(checkpoint().params, prompts(), KEY)


def decoding(settings: MeshSettings) -> dict:
    """What a block's compiled program sends between devices, with a vocabulary of several blocks of the sampler."""
    own, mesh = checkpoint(VOCAB), build_mesh(settings)
    made = generator(own.model, SAMPLINGS["sampled"], mesh)
    params = reshard(own.params, rollout_placement(own.model, mesh))
    shape = made.shapes[0]
    zeros = np.zeros(shape.rows, np.int32)
    rows = Rows(zeros + 3, zeros + 3, zeros, np.zeros((shape.rows, shape.group), np.int32), zeros)
    with jax.set_mesh(mesh):
        cache, shared = programs.empty_program(own.model, shape=shape, prompt=8)
        lowered = programs.decode_program.lower(
            own.model, params, cache, shared, put_rows(rows, mesh), jax.random.key(0), steps=made.steps,
            sampling=made.sampling,
        )  # fmt: skip
    compiled = lowered.compile()
    return {
        "collectives": collectives(compiled.as_text()),
        "completions": shape.rows * shape.group // row_shares(mesh),
        "heads": cache.own[0].key.addressable_shards[0].data.shape[2],
        "donated": compiled.memory_analysis().alias_size_in_bytes,
        "held": sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(cache)),
    }


class Reader:
    """Pictures of one size, or of several for Qwen's tower."""

    def __init__(self, sizes: bool):
        self._sizes = sizes

    def grid(self, key: str) -> Grid:
        return Grid(1 + ord(key) % 3, 2) if self._sizes else Grid(1, SOFT_TOKENS)

    def read(self, keys: list[str]) -> list:
        if not self._sizes:
            return list(pictures(keys))
        return [self._patches(key) for key in keys]

    def _patches(self, key: str) -> Patches:
        rows, columns = (2 * n for n in self.grid(key))
        numbers = family("qwen2.5-vl").model.config.vision.patch_size
        values = np.random.default_rng(ord(key)).normal(size=(rows * columns, numbers))
        return Patches(values.astype(np.float32), rows, columns)


def encoded(own, *, sizes: bool) -> dict:
    """Features of eleven images with the tower cut by fsdp: no whole number of chunks, each shared out over devices."""
    mesh = build_mesh(MeshSettings(data=4, fsdp=2))
    params = reshard(own.params, training_placement(own.model, mesh))
    store = FeatureStore(own.model, params, Reader(sizes), chunk=4, mesh=mesh)
    found = store.features(list("abcdefghijk"))
    expected = FeatureStore(own.model, own.params, Reader(sizes), chunk=4).features(list("abcdefghijk"))
    return {
        "gap": max(
            float(np.max(np.abs(a - b)) / max(1, np.max(np.abs(b)))) for a, b in zip(found, expected, strict=True)
        ),
        "shapes": len({x.shape for x in expected}),
        "encoded": store.encoded,
    }


def refusal() -> str:
    try:
        replace(generator(checkpoint().model, SAMPLINGS["greedy"]), rows=12, mesh=build_mesh(MeshSettings()))
    except ValueError as error:
        return str(error)
    return ""


def main(which: str) -> None:
    assert jax.device_count() == 8
    found = {"rollouts": {mesh: sampled(MESHES[mesh], names) for mesh, names in RUNS[which].items()}}
    if which == "few":
        found |= {
            "decode": {name: decoding(mesh) for name, mesh in MESHES.items()},
            "parameters": [list(x.shape) for x in checkpoint(VOCAB).model.shapes.values()],
            "features": encoded(vlm(), sizes=False),
            "refusal": refusal(),
        }
    else:
        found["features"] = encoded(family("qwen2.5-vl"), sizes=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
