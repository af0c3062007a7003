"""Train a tiny base model from nothing, and write it as an ordinary Hugging Face folder.

    python scripts/make_tiny_base.py --family gemma3 --out configs/models/tiny-medgemma

Families: gemma3 and qwen2_5_vl, taught on invented films (tiny_bases/films.py); llama and qwen2_5, taught on invented
records, questions with four options and simple constraints (tiny_bases/ward.py). About a million parameters each, all of
them trained; no study evaluates on what they are taught.
The same seed and machine give the same files.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny_bases import films
from tiny_bases.families import SOFT_TOKENS, TINY_BASES, TinyBase

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.films.pixels import open_pixels
from vlmalign.data.groups import collate
from vlmalign.models.families import read_config
from vlmalign.models.model import Model
from vlmalign.models.towers import arrange
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.randomness import key_for
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.types import Grid, Group
from vlmalign.weights.checkpoint import save_params

BATCH = 48
#: the loss of every step, beside the weights
CURVE = "loss_curve.json"
_SIDE = 4  # soft tokens per side of a film


@cache
def make_films(step: int, seed: int) -> np.ndarray:
    """The films of one optimiser step, [48, 64, 64]; kept, since they come again."""
    return np.stack([films.make_film(step * BATCH + i, seed) for i in range(BATCH)])


def make_groups(base: TinyBase, chat: Chat, step: int, task: str, seed: int) -> list[Group]:
    """The conversations of one step; the few that are too long for the layout are left out."""
    groups, layout = [], base.layout(task)
    for i in range(BATCH):
        number = step % base.repeat * BATCH + i
        group = chat.example(base.material.conversation(number, task, seed), group_id=i)
        if len(group.prompt) <= layout.prompt and len(group.continuations[0]) <= layout.completion:
            groups.append(group)
    return groups


class Batches:
    """The steps' batches. Films are drawn in a process of their own, ahead of their use."""

    def __init__(self, base: TinyBase, folder: Path, model: Model, seed: int):
        self._base, self._model, self._seed = base, model, seed
        family = model.config.family
        self._sees = model.config.vision is not None
        self._chat = open_chat(folder, family=family, image_tokens=(lambda key: SOFT_TOKENS) if self._sees else None)
        self._pixels = open_pixels(folder, family=family, image_tokens=SOFT_TOKENS) if self._sees else None

    def __call__(self, steps: int, total: int) -> Iterator[MicroBatch]:
        if not self._sees:
            for step in range(steps):
                yield self._batch(step, total, None)
            return
        numbers = (step % self._base.repeat for step in range(steps))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            for step, drawn in enumerate(pool.imap(partial(make_films, seed=self._seed), numbers)):
                yield self._batch(step, total, drawn)

    def _batch(self, step: int, total: int, drawn: np.ndarray | None) -> MicroBatch:
        task = self._base.material.task_of(step, total)
        groups = make_groups(self._base, self._chat, step, task, self._seed)
        grid = (lambda key: Grid(_SIDE, _SIDE)) if self._sees else None
        axes = self._model.config.decoder.position_axes
        batch, keys = collate(groups, self._base.layout(task), rows=BATCH, grid=grid, position_axes=axes)
        if drawn is None or self._pixels is None:
            return MicroBatch(batch, {})
        # Distinct images in the order in which the batch asks for them; rows left out are filled up.
        order = [int(key) % BATCH for key in keys] + [0] * (BATCH - len(keys))
        pictures = [self._pixels.finish(np.repeat(drawn[i][:, :, None], 3, axis=2)) for i in order]
        return MicroBatch(batch._replace(pixels=arrange(self._model.config.vision, pictures)), {})


def train(family: str, out: Path, *, steps: int, total: int, seed: int) -> list[float]:
    """Train the first `steps` of a course of `total`, write the folder, return every step's loss (nat per token)."""
    started = time.perf_counter()
    base = TINY_BASES[family]
    config = json.loads(base.write_text_side(out, seed).to_json_string(use_diff=False))
    model = Model(read_config(config))
    params = model.init(key_for(seed, 0, "init"))
    print(f"{sum(v.size for v in params.values()):,} parameters")

    settings = OptimiserSettings(learning_rate=2e-3, warmup=0.05, weight_decay=0.05, clip_norm=1.0)
    trainer = Trainer(model, Objective("sft", sft_loss, sft_counts), build_optimiser(settings, total))
    state = trainer.init(params)
    losses = []
    for step, batch in enumerate(Batches(base, out, model, seed)(steps, total)):
        state, metrics = trainer.step(state, {}, [batch])
        losses.append(metrics.loss)  # still on the device: the next batch is made while this one is computed
        if step % 100 == 99:
            mean = np.mean(jax.device_get(losses[-100:]))
            print(f"step {step + 1} of {steps}: loss {mean:.3f}, {time.perf_counter() - started:.0f} s", flush=True)

    losses = [float(loss) for loss in losses]
    save_params(out, {name: value.astype(jnp.bfloat16) for name, value in state.params.items()}, model, config)
    record = {"seed": seed, "total": total, "losses": [round(loss, 5) for loss in losses]}
    (out / CURVE).write_text(json.dumps(record) + "\n", encoding="utf-8")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=list(TINY_BASES), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, help=f"optimiser steps of {BATCH} questions (default: the family's)")
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    started = time.perf_counter()
    steps = options.steps or TINY_BASES[options.family].steps
    train(options.family, options.out, steps=steps, total=steps, seed=options.seed)
    size = sum(file.stat().st_size for file in options.out.iterdir())
    print(
        f"wrote {options.out} ({size / 1e6:.1f} MB) in {(time.perf_counter() - started) / 60:.1f} min on {jax.devices()}"
    )


if __name__ == "__main__":
    main()
