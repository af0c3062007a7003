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
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from functools import partial
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from gpu_kernels import busiest_kernels
from gpu_setup import Ahead, Prepared, Step
from gpu_shapes import MODELS, Record, Shape, read_sizes, seconds

from vlmalign.models.lora import LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.models.sizes import cache_bytes, head_weights, layer_weights, siglip_flops
from vlmalign.planning.this_device import this_device
from vlmalign.rollout.engine import BLOCK
from vlmalign.training.step import MicroBatch, Trainer
from vlmalign.weights.checkpoint import load_config

PARTS = ("encode", "update", "step", "decode", "more")
#: and, where it is asked for, where the time of the first decode program goes
KERNELS = "kernels"
#: rows, completions per row and top_p of the decode programs that are timed
DECODES = "8:4:0.95,8:4:1,1:1:1,32:4:0.95"
#: remat policy, attention, and groups per micro-batch: first of the update whose memory is measured, then of the others
UPDATES = "full:auto:8,none:auto:2,none:cudnn:2,attention:auto:8"


class Bench:
    """The parts, timed."""

    def __init__(self, made: Prepared, record: Record, asked: argparse.Namespace):
        self.made, self._record, self._repeats = made, record, asked.repeats
        self._rows_of_step = asked.rows
        self._how = [(name, attention, int(rows)) for name, attention, rows in _fields(asked.updates)]
        self._decodes = [(int(rows), int(group), float(top_p)) for rows, group, top_p in _fields(asked.decodes)]
        self._films = 0  #: encoded so far
        self._updates: dict[tuple[str, str, int], tuple[Trainer, list[MicroBatch]]] = {}
        self._step: Step | None = None
        self.device = this_device("bfloat16")

    def _peak(self) -> float | None:
        """GiB; the highest point of this process so far, as the GPU's allocator counts it."""
        stats = jax.devices()[0].memory_stats() or {}
        return round(stats["peak_bytes_in_use"] / 2**30, 2) if "peak_bytes_in_use" in stats else None

    def rates(self) -> None:
        self._record.add(
            "rates", device=self.device.title, copy_tb_s=self.device.bandwidth / 1e12,
            matmul_tflop_s=self.device.flops["bfloat16"] / 1e12, weights_gib=sum(value.nbytes for value in self.made.base.values()) / 2**30,
        )  # fmt: skip

    def compile(self, parts: Sequence[str]) -> None:
        """Everything that `parts` will run, side by side."""
        ahead = Ahead()
        if "step" in parts:
            self._step = self.made.step(self._rows_of_step)
            ahead.add("step reference", lambda: self.made.lower_reference(self._step.trainer, self._step.batch))
            ahead.add("step gradients", lambda: self.made.lower_gradients(self._step.trainer, self._step.batch))
            ahead.add("step optimiser", lambda: self.made.lower_optimiser(self._step.trainer))
        first, *others = self._how
        for how in [*([first] if "update" in parts else []), *(others if "more" in parts else [])]:
            trainer, held = self._updates[how] = self.made.update(*how)
            ahead.add(f"update {how}", partial(self.made.lower_gradients, trainer, held[0]))
            ahead.add(f"optimiser {how}", partial(self.made.lower_optimiser, trainer))
        if {"decode", KERNELS} & set(parts):
            for how in self._decodes:
                device, slots = self.made.rows(*how)
                ahead.add(f"decode {how}", partial(device.lower_block, slots))
                del device
        if self.made.features is not None and {"encode", "step"} & set(parts):
            ahead.add("encode", lambda: self.made.features._program.lower(self.made.base, self.made.films()))
        if "step" in parts:  # compiles side by side what it samples with, beside all of the above
            began = time.perf_counter()
            self._step.generator.warm_up(self._step.source._merge(self.made.base, self._step.state.params))
            self._record.add(
                "warm_up", seconds=round(time.perf_counter() - began, 1), programs=len(self._step.generator.shapes)
            )
        self._record.add("compile", **ahead.wait(), peak_gib=self._peak())

    def encode(self) -> None:
        """New films through the tower, as a rollout asks for them, and the tower alone."""
        if self.made.features is None:
            return
        images = self.made.shape.prompts

        def run() -> None:
            keys = [str(10**6 + self._films + i) for i in range(images)]
            self._films += images
            self.made.features.features(keys)

        took = seconds(run, warm=1, repeats=self._repeats)
        held = jax.device_put(self.made.films())
        tower = seconds(
            lambda: jax.block_until_ready(self.made.features._program(self.made.base, held)),
            warm=1,
            repeats=self._repeats,
        )["seconds"]  # without drawing the films and moving them
        flops = images * siglip_flops(self.made.model.config)
        self._record.add(
            "encode", images=images, **took, tower_s=tower, tflop=flops / 1e12,
            tower_share_of_matmul=flops / tower / self.device.flops["bfloat16"], peak_gib=self._peak(),
        )  # fmt: skip

    def decode(self) -> None:
        for rows, group, top_p in self._decodes:
            device, slots = self.made.rows(rows, group, top_p)
            took = seconds(lambda: device.block(slots), warm=2, repeats=4 * self._repeats)  # noqa: B023
            config, kv = self.made.model.config.decoder, cache_bytes(self.made.model)
            weights = 2 * (layer_weights(config) + head_weights(config))
            read = weights + rows * kv * (self.made.shape.prompt + group * self.made.shape.completion)
            token = took["seconds"] / BLOCK
            self._record.add(
                "decode", rows=rows, group=group, top_p=top_p, cache=self.made.shape.completion, ms_per_token=1e3 * token,
                tokens_per_s=rows * group / token, bytes_gb=read / 1e9, tb_s=read / token / 1e12,
                share_of_copy=read / token / self.device.bandwidth, peak_gib=self._peak(), block=took,
            )  # fmt: skip
            del device
            gc.collect()

    def kernels(self) -> None:
        """Of the first decode program: kernels by their time, in microseconds per block."""
        device, slots = self.made.rows(*self._decodes[0])
        device.block(slots)
        found = busiest_kernels(lambda: device.block(slots), calls=3)
        self._record.add(KERNELS, decode=self._decodes[0], tokens=BLOCK, most=found)

    def useful_flops(self, rows: int) -> float:
        """Of an update of `rows` groups; see the head of this file."""
        config, shape = self.made.model.config.decoder, self.made.shape
        length = shape.prompt + shape.group * shape.completion
        pairs = shape.prompt**2 / 2 + shape.group * shape.completion * (shape.prompt + shape.completion / 2)
        attention = 12 * len(config.layers) * config.heads * config.head_dim * pairs
        adapter = sum(slot.size for name, slot in self.made.model.shapes.items() if is_adapter(name))
        dense = length * (4 * layer_weights(config) + 6 * adapter)
        return rows * (dense + attention + 4 * head_weights(config) * shape.group * shape.completion)

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
        state = self.made.state(trainer)

        def run() -> None:
            nonlocal state
            state, found = trainer.step(state, self.made.base, held)
            jax.block_until_ready((state.params, found))

        took = seconds(run, warm=2, repeats=self._repeats)
        flops = self.useful_flops(self.made.shape.prompts)
        self._record.add(
            "update", **_named(how), layout=list(held[0].groups.layout), micro_batches=len(held), **took,
            tflop=flops / 1e12, tflop_s=flops / took["seconds"] / 1e12,
            mfu=flops / took["seconds"] / self.device.flops["bfloat16"], peak_gib=self._peak(),
        )  # fmt: skip

    def step(self) -> None:
        """Whole GRPO steps on new films: merge, encode, sample, score, reference, update."""
        (source, _, trainer, state, _), shape = self._step, self.made.shape
        self._step = None
        rollouts, references = [], []

        def run() -> None:
            nonlocal state
            began = time.perf_counter()
            work = source.work(len(rollouts), state.params)
            rollouts.append(time.perf_counter() - began)
            batches = []
            for batch in work.batches:  # as `Trainer.step` does where nothing is recorded
                logp = jax.block_until_ready(trainer.reference_logp(self.made.base, batch.groups))
                batches.append(batch._replace(recorded={**batch.recorded, "ref_logp": logp}))
            references.append(time.perf_counter() - began - rollouts[-1])
            state, found = trainer.step(state, self.made.base, batches, work.options)
            jax.block_until_ready((state.params, found))

        took = seconds(run, warm=1, repeats=self._repeats)
        self._record.add(
            "step", prompts=shape.prompts, group=shape.group, remat=self.made.model.remat, rows=self._rows_of_step, **took,
            rollout_s=float(np.median(rollouts[1:])), reference_s=float(np.median(references[1:])), peak_gib=self._peak(),
        )  # fmt: skip


def _fields(text: str) -> list[list[str]]:
    return [part.split(":") for part in text.split(",")]


def _installed(name: str) -> bool:
    return any(True for _ in distributions(name=name))


def _named(how: tuple[str, str, int]) -> dict[str, Any]:
    return dict(zip(("remat", "attention", "rows"), how, strict=True))


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
    bench = Bench(Prepared(model, shape), record, asked)
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
