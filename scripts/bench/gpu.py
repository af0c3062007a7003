"""vlmalign at full size on one GPU, with random weights: encoding, decoding, updates and a whole ChexReason step.

    python scripts/bench/gpu.py --model medgemma-4b --out scripts/bench/results/gpu_medgemma_4b.json
    python scripts/bench/gpu.py --model llama-3-8b --parts decode,update

Prints one JSON line per part. Every program is compiled before the first one is timed, all of them side by side.
Decoding is given as a share of the rate at which this GPU copies memory, training as a share of the rate at which it
multiplies 8192 x 8192 bfloat16 matrices of random numbers, both measured here first. `gpu_peer.py` does the same work
with transformers and torch.

`peak_gib` is the highest point of the process so far: the parts run in the order of what they need, so that it is that
of a part itself where the part raises it. Compiling tries kernels out, and may have needed more than the first parts.

Bytes of a decoded token: the decoder's weights and the output matrix once, the prompts' keys and values once each, the
completions' own caches as allocated. Operations of an update: 4 per number of the layers' matrices and token, 6 of the
adapter's, 4 per number of the output matrix and learnt token, and 12 x heads x head size per pair of tokens that see
each other and layer; what rematerialisation computes again is not counted.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_shapes import MODELS, Record, Shape, read_sizes, seconds

from vlmalign.models.linear import is_projection
from vlmalign.models.lora import LoraSpec, init_adapter, is_adapter
from vlmalign.models.model import Model, Params
from vlmalign.models.sizes import cache_bytes, head_weights, layer_weights, siglip_flops
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.planning.this_device import this_device
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.rollout.compaction import DecodeShape
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.decode_weights import joined, with_made
from vlmalign.rollout.device_rows import DeviceRows
from vlmalign.rollout.engine import BLOCK
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.slots import Ending, Slots
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser
from vlmalign.training.policy import PolicySource
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import Task
from vlmalign.training.step import MicroBatch, Objective, Trainer, TrainState
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.types import Grid, Group, Segment
from vlmalign.weights.checkpoint import load_config

PARTS = ("encode", "update", "step", "decode", "more")
#: rows, completions per row and top_p of the decode programs that are timed
DECODES = "8:4:0.95,8:4:1,1:1:1,32:4:0.95"
#: remat policy, attention, and groups per micro-batch: first of the update whose memory is measured, then of the others
UPDATES = "full:auto:8,none:auto:2,none:cudnn:2,attention:auto:8"


class Ahead:
    """Programs compiled side by side, each traced as it is added."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0)))
        self._began, self._waiting, self._failed = time.perf_counter(), {}, {}

    def add(self, name: str, lower: Callable[[], jax.stages.Lowered]) -> None:
        try:
            self._waiting[name] = self._pool.submit(self._compile, lower())
        except ValueError as error:  # what cannot run here is a result
            self._failed[name] = str(error)[:300]

    @staticmethod
    def _compile(lowered: jax.stages.Lowered) -> tuple[float, jax.stages.Compiled]:
        began = time.perf_counter()
        compiled = lowered.compile()
        return time.perf_counter() - began, compiled

    def wait(self) -> dict[str, Any]:
        """Seconds in all and of each program; what did not compile, and why; its memory as the compiler planned it."""
        took, memory = {}, {}
        for name, future in self._waiting.items():
            try:
                took[name], compiled = future.result()
                memory[name] = _memory(compiled)
            except jax.errors.JaxRuntimeError as error:
                self._failed[name] = str(error)[:300]
        return {
            "seconds": round(time.perf_counter() - self._began, 1),
            "each": {name: round(t, 1) for name, t in took.items()},
            "failed": self._failed,
            "gib": memory,
        }


class Pictures:
    """Random films, a new one for every key."""

    def __init__(self, side: int, tokens: int):
        self._side, self._grid = side, Grid(round(tokens**0.5), round(tokens**0.5))

    def grid(self, key: str) -> Grid:
        del key
        return self._grid

    def read(self, keys: list[str]) -> list[np.ndarray]:
        shape = (3, self._side, self._side)
        return [np.random.default_rng(int(key)).random(shape, np.float32) * 2 - 1 for key in keys]


def random_params(model: Model) -> dict[str, jax.Array]:
    """Matrices of standard deviation .02, norms that multiply by 1, biases 0; made on the device."""

    def normal(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        return (0.02 * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    make = jax.jit(normal, static_argnums=(1, 2))
    found = {}
    for number, (name, slot) in enumerate(model.without_lora().shapes.items()):
        if len(slot.shape) > 1:
            found[name] = make(jax.random.key(number), slot.shape, slot.dtype)
        else:
            offset = model.config.decoder.norm_offset if name.startswith("language_model") else 0.0
            found[name] = jnp.full(slot.shape, 1.0 - offset if "norm" in name else 0.0, slot.dtype)
    return found


class Bench:
    """One model with random weights on the GPU, and its parts."""

    def __init__(self, model: Model, shape: Shape, record: Record, asked: argparse.Namespace):
        self.model, self.shape, self._record, self._repeats = model, shape, record, asked.repeats
        self._rows_of_step = asked.rows
        self._how = [(name, attention, int(rows)) for name, attention, rows in _fields(asked.updates)]
        self._decodes = [(int(rows), int(group), float(top_p)) for rows, group, top_p in _fields(asked.decodes)]
        self.base = random_params(model)
        self.vision = model.config.vision
        self.features = self._store()
        self._rng, self._number = np.random.default_rng(0), 0
        self._updates: dict[tuple[str, str, int], tuple[Trainer, list[MicroBatch]]] = {}
        self._step: Step | None = None
        self.device = this_device("bfloat16")

    def _store(self) -> FeatureStore | None:
        if self.vision is None:
            return None
        pictures = Pictures(self.vision.image_size, self.vision.tokens)
        return FeatureStore(self.model, self.base, pictures, chunk=self.shape.prompts)

    def _group(self, group: int) -> Group:
        """A new prompt, which shows a new film where there is a tower, with `group` random answers."""
        self._number += 1
        vocab, length = self.model.config.decoder.vocab, self.shape.prompt
        tokens = self._rng.integers(16, vocab - 64, length).astype(np.int32)
        image, keys = np.full(length, -1, np.int32), ()
        if self.vision is not None:
            image[8 : 8 + self.vision.tokens], keys = 0, (str(self._number),)
        answers = tuple(self._answer() for _ in range(group))
        return Group(self._number, Segment(tokens, image, np.zeros(length, np.float32)), answers, keys)

    def _answer(self) -> Segment:
        length = self.shape.completion
        tokens = self._rng.integers(16, self.model.config.decoder.vocab - 64, length).astype(np.int32)
        return Segment(tokens, np.full(length, -1, np.int32), np.ones(length, np.float32))

    def _peak(self) -> float | None:
        """GiB; the highest point of this process so far, as the GPU's allocator counts it."""
        stats = jax.devices()[0].memory_stats() or {}
        return round(stats["peak_bytes_in_use"] / 2**30, 2) if "peak_bytes_in_use" in stats else None

    def rates(self) -> None:
        self._record.add(
            "rates", device=self.device.title, copy_tb_s=self.device.bandwidth / 1e12,
            matmul_tflop_s=self.device.flops["bfloat16"] / 1e12, weights_gib=self._bytes() / 2**30,
        )  # fmt: skip

    def _bytes(self) -> int:
        return sum(value.nbytes for value in self.base.values())

    def compile(self, parts: Sequence[str]) -> None:
        """Everything that `parts` will run, side by side."""
        ahead = Ahead()
        if "step" in parts:
            self.prepare_step()
            ahead.add("step reference", lambda: self._lower_reference(self._step.trainer, self._step.batch))
            ahead.add("step gradients", lambda: self._lower_gradients(self._step.trainer, self._step.batch))
            ahead.add("step optimiser", lambda: self._lower_optimiser(self._step.trainer))
        first, *others = self._how
        for how in [*([first] if "update" in parts else []), *(others if "more" in parts else [])]:
            trainer, held = self._updates[how] = self.prepare_update(*how)
            ahead.add(f"update {how}", partial(self._lower_gradients, trainer, held[0]))
            ahead.add(f"optimiser {how}", partial(self._lower_optimiser, trainer))
        if "decode" in parts:
            for how in self._decodes:
                device, slots = self._rows(*how)
                ahead.add(f"decode {how}", partial(device.lower_block, slots))
                del device
        if self.features is not None and {"encode", "step"} & set(parts):
            ahead.add("encode", lambda: self.features._program.lower(self.base, self._films()))
        if "step" in parts:  # compiles side by side what it samples with, beside all of the above
            began = time.perf_counter()
            self._step.generator.warm_up(self._step.source._merge(self.base, self._step.state.params))
            self._record.add(
                "warm_up", seconds=round(time.perf_counter() - began, 1), programs=len(self._step.generator.shapes)
            )
        self._record.add("compile", **ahead.wait(), peak_gib=self._peak())

    def _films(self) -> np.ndarray:
        keys = ["1"] * self.shape.prompts
        return np.stack(Pictures(self.vision.image_size, self.vision.tokens).read(keys))

    def encode(self) -> None:
        """New films through the tower, as a rollout asks for them, and the tower alone."""
        if self.features is None:
            return
        images = self.shape.prompts

        def run() -> None:
            keys = [str(10**6 + self._number + i) for i in range(images)]
            self._number += images
            self.features.features(keys)

        took = seconds(run, warm=1, repeats=self._repeats)
        held = jax.device_put(self._films())
        tower = seconds(
            lambda: jax.block_until_ready(self.features._program(self.base, held)), warm=1, repeats=self._repeats
        )["seconds"]  # without drawing the films and moving them
        flops = images * siglip_flops(self.model.config)
        self._record.add(
            "encode", images=images, **took, tower_s=tower, tflop=flops / 1e12,
            tower_share_of_matmul=flops / tower / self.device.flops["bfloat16"], peak_gib=self._peak(),
        )  # fmt: skip

    def _policy(self) -> dict[str, jax.Array]:
        """The base as rollouts have a merged policy: a copy of the decoder's matrices, joined."""
        matrices = {name: value for name, value in self.base.items() if is_projection(name)}
        return with_made(self.model, self.base, jax.jit(partial(joined, self.model))(matrices))

    def _rows(self, rows: int, group: int, top_p: float) -> tuple[DeviceRows, Slots]:
        """Rows as they are decoded at the end of a rollout: caches of the full length."""
        device = DeviceRows(
            self.model.without_lora(), self._policy(),
            jax.random.key(0), prompt=self.shape.prompt, steps=BLOCK,
            sampling=Sampling(self.shape.temperature, top_p), mesh=None,
        )  # fmt: skip
        device.open(DecodeShape(rows, group, self.shape.completion))
        slots = Slots(rows, group, Ending(self.shape.completion, ()))
        for row in range(rows):
            slots.put(row, row, group_id=row, length=self.shape.prompt, next_position=self.shape.prompt)
        return device, slots

    def decode(self) -> None:
        for rows, group, top_p in self._decodes:
            device, slots = self._rows(rows, group, top_p)
            took = seconds(lambda: device.block(slots), warm=2, repeats=4 * self._repeats)  # noqa: B023
            config, kv = self.model.config.decoder, cache_bytes(self.model)
            weights = 2 * (layer_weights(config) + head_weights(config))
            read = weights + rows * kv * (self.shape.prompt + group * self.shape.completion)
            token = took["seconds"] / BLOCK
            self._record.add(
                "decode", rows=rows, group=group, top_p=top_p, cache=self.shape.completion, ms_per_token=1e3 * token,
                tokens_per_s=rows * group / token, bytes_gb=read / 1e9, tb_s=read / token / 1e12,
                share_of_copy=read / token / self.device.bandwidth, peak_gib=self._peak(), block=took,
            )  # fmt: skip
            del device
            gc.collect()

    def useful_flops(self, rows: int) -> float:
        """Of an update of `rows` groups; see the head of this file."""
        config, shape = self.model.config.decoder, self.shape
        length = shape.prompt + shape.group * shape.completion
        pairs = shape.prompt**2 / 2 + shape.group * shape.completion * (shape.prompt + shape.completion / 2)
        attention = 12 * len(config.layers) * config.heads * config.head_dim * pairs
        adapter = sum(slot.size for name, slot in self.model.shapes.items() if is_adapter(name))
        dense = length * (4 * layer_weights(config) + 6 * adapter)
        return rows * (dense + attention + 4 * head_weights(config) * shape.group * shape.completion)

    def _trainer(self, model: Model, beta: float, reference: Params | None = None) -> Trainer:
        settings = GrpoSettings(beta=beta, max_completion=self.shape.completion)
        objective = Objective(
            "grpo",
            lambda scores, batch: grpo_loss(scores, batch, settings=settings),
            lambda batches: grpo_counts(batches, settings=settings),
            temperature=self.shape.temperature,
            needs_reference=beta > 0,
        )
        optimiser = build_optimiser(OptimiserSettings(1e-6, warmup=0.0, schedule="constant"), 10**6)
        return Trainer(model, objective, optimiser, reference=None if reference is None else (model, reference))

    def _state(self, trainer: Trainer) -> TrainState:
        return trainer.init(init_adapter(self.model.shapes, self.base, key=jax.random.key(0)))

    def _lower_gradients(self, trainer: Trainer, batch: MicroBatch) -> jax.stages.Lowered:
        """As `Trainer.step` calls it."""
        state = jax.eval_shape(lambda: self._state(trainer))
        counts = trainer.objective.counts([batch.groups])
        known = dict(batch.recorded)
        if trainer.objective.needs_reference:
            known["ref_logp"] = jax.ShapeDtypeStruct(batch.groups.weight.shape, jnp.float32)
        return trainer._accumulate.lower(state.params, state.params, self.base, batch.groups, known, counts, state.step)

    def _lower_optimiser(self, trainer: Trainer) -> jax.stages.Lowered:
        state = jax.eval_shape(lambda: self._state(trainer))
        return trainer._apply.lower(state, state.params, jax.ShapeDtypeStruct((), jnp.float32))

    def _lower_reference(self, trainer: Trainer, batch: MicroBatch) -> jax.stages.Lowered:
        return trainer._reference_logp.lower(self.base, trainer.reference[1], batch.groups)

    def prepare_update(self, remat: str, attention: str, rows: int) -> tuple[Trainer, list[MicroBatch]]:
        """A trainer, and `prompts` groups in micro-batches of `rows`."""
        groups = [self._group(self.shape.group) for _ in range(self.shape.prompts)]
        model = Model(self.model.config, self.model.lora, self.model.dtype, attention, remat)
        shapes = Shapes(rows=rows, prompt_multiple=8, completion_multiple=8)
        size = (rows, self.shape.group, self.shape.completion)
        advantage = np.linspace(-1, 1, rows * self.shape.group, dtype=np.float32).reshape(size[:2])
        known = {name: np.full(size, -12.0, np.float32) for name in ("rollout_logp", "kept_logp")}
        batches = micro_batches(groups, shapes, self.features)
        return self._trainer(model, 0.0), [MicroBatch(b._replace(advantage=advantage), known) for b in batches]

    def update(self) -> None:
        self._update(self._how[0])

    def more(self) -> None:
        for how in self._how[1:]:
            try:
                self._update(how)
            except (jax.errors.JaxRuntimeError, ValueError) as error:  # what does not fit or run here is a result
                self._record.add("update", **_named(how), error=str(error)[:300])
            gc.collect()

    def _update(self, how: tuple[str, str, int]) -> None:
        trainer, held = self._updates.pop(how)
        state = self._state(trainer)

        def run() -> None:
            nonlocal state
            state, found = trainer.step(state, self.base, held)
            jax.block_until_ready((state.params, found))

        took = seconds(run, warm=2, repeats=self._repeats)
        flops = self.useful_flops(self.shape.prompts)
        self._record.add(
            "update", **_named(how), layout=list(held[0].groups.layout), micro_batches=len(held), **took,
            tflop=flops / 1e12, tflop_s=flops / took["seconds"] / 1e12,
            mfu=flops / took["seconds"] / self.device.flops["bfloat16"], peak_gib=self._peak(),
        )  # fmt: skip

    def prepare_step(self) -> None:
        """What whole GRPO steps are made of: the policy begins as the reference, an adapter of its own."""
        shape = self.shape
        start = init_adapter(self.model.shapes, self.base, key=jax.random.key(0))
        trainer = self._trainer(self.model, 0.15, reference=jax.tree.map(jnp.copy, start))
        generator = Generator(
            model=self.model.without_lora(), features=self.features, stop_ids=(), rows=shape.prompts, group=shape.group,
            completion=shape.completion, sampling=Sampling(shape.temperature, shape.top_p), multiple=8,
            prompt_lengths=(shape.prompt,), smaller=0,  # every completion runs to its end here
        )  # fmt: skip

        def score(number, keys, texts, completions, columns) -> ScoredBatch:
            del number, keys, texts, columns
            return ScoredBatch([float(len(set(text)) % 7) for text in completions], {}, ())

        shapes = Shapes(rows=self._rows_of_step, prompt_multiple=8, completion_multiple=8)
        source = PolicySource(
            [Task(self._group(0), "", {}) for _ in range(shape.prompts * 16)], generator=generator, trainer=trainer,
            base=self.base, decode=lambda tokens: " ".join(map(str, tokens.tolist())), score=score,
            shapes=shapes, settings=RolloutSettings(shape.prompts, scale="group"),
        )  # fmt: skip
        size = (self._rows_of_step, shape.group, shape.completion)
        known = {name: np.zeros(size, np.float32) for name in ("rollout_logp", "kept_logp")}
        groups = [self._group(shape.group) for _ in range(self._rows_of_step)]
        (batch,) = micro_batches(groups, shapes, self.features)
        batch = batch._replace(advantage=np.zeros(size[:2], np.float32), truncated=np.zeros(size[:2], bool))
        self._step = Step(source, generator, trainer, trainer.init(start), MicroBatch(batch, known))

    def step(self) -> None:
        """Whole GRPO steps on new films: merge, encode, sample, score, reference, update."""
        (source, _, trainer, state, _), shape = self._step, self.shape
        self._step = None
        rollouts, references = [], []

        def run() -> None:
            nonlocal state
            began = time.perf_counter()
            work = source.work(len(rollouts), state.params)
            rollouts.append(time.perf_counter() - began)
            batches = []
            for batch in work.batches:  # as `Trainer.step` does where nothing is recorded
                logp = jax.block_until_ready(trainer.reference_logp(self.base, batch.groups))
                batches.append(batch._replace(recorded={**batch.recorded, "ref_logp": logp}))
            references.append(time.perf_counter() - began - rollouts[-1])
            state, found = trainer.step(state, self.base, batches, work.options)
            jax.block_until_ready((state.params, found))

        took = seconds(run, warm=1, repeats=self._repeats)
        self._record.add(
            "step", prompts=shape.prompts, group=shape.group, remat=self.model.remat, rows=self._rows_of_step, **took,
            rollout_s=float(np.median(rollouts[1:])), reference_s=float(np.median(references[1:])), peak_gib=self._peak(),
        )  # fmt: skip


class Step(NamedTuple):
    """What a GRPO step is made of, and a batch of its shape."""

    source: PolicySource
    generator: Generator
    trainer: Trainer
    state: TrainState
    batch: MicroBatch


def _fields(text: str) -> list[list[str]]:
    return [part.split(":") for part in text.split(",")]


def _installed(name: str) -> bool:
    return any(True for _ in distributions(name=name))


def _named(how: tuple[str, str, int]) -> dict[str, Any]:
    return dict(zip(("remat", "attention", "rows"), how, strict=True))


def _memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """GiB that the compiler set aside."""
    stats = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes", "alias_size_in_bytes")
    return {name.removesuffix("_size_in_bytes"): round(getattr(stats, name) / 2**30, 3) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="medgemma-4b", help=f"{', '.join(MODELS)}, or a config.json")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers, for a trial")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--decodes", default=DECODES, help="rows:completions:top_p,...")
    parser.add_argument("--updates", default=UPDATES, help="remat:attention:groups per micro-batch,...")
    parser.add_argument("--remat", default="full", help="of the whole step")
    parser.add_argument("--rows", type=int, default=Shape.prompts, help="groups per micro-batch of the whole step")
    parser.add_argument("--prompt", type=int, default=Shape.prompt)
    parser.add_argument("--completion", type=int, default=Shape.completion)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--compile-only", action="store_true", help="to fill JAX_COMPILATION_CACHE_DIR, several at once"
    )
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(read_sizes(asked.model, asked.layers)), encoding="utf-8")
        config = load_config(Path(folder))
    shape = Shape(prompt=asked.prompt, completion=asked.completion)
    names = [name for name in ("jax", "jaxlib", "flax", "jax-cuda13-plugin", "jax-cuda12-plugin") if _installed(name)]
    versions = {name: version(name) for name in names} | {"python": platform.python_version()}
    record = Record(
        asked.out,
        {"model": asked.model, "layers": asked.layers, "dtype": "bfloat16", "shape": vars(shape), "versions": versions},
    )
    model = Model(config, LoraSpec(shape.rank, 2.0 * shape.rank), dtype="bfloat16", remat=asked.remat)
    bench = Bench(model, shape, record, asked)
    bench.rates()
    parts = asked.parts.split(",")
    bench.compile(parts)
    if asked.compile_only:
        return
    failed = False
    for part in parts:
        try:
            getattr(bench, part)()
        except Exception:  # on a machine that is paid by the second, the other parts are still worth their time
            failed = True
            record.add(part, error=traceback.format_exc())
    sys.exit(failed)


if __name__ == "__main__":
    main()
