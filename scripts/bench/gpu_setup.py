"""What `gpu.py` times, made ready: a model with random weights, its batches, trainers and rows, and its programs traced."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from gpu_shapes import Shape

from vlmalign.models.linear import is_projection
from vlmalign.models.lora import init_adapter
from vlmalign.models.model import Model, Params
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
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


def _memory(compiled: jax.stages.Compiled) -> dict[str, float]:
    """GiB that the compiler set aside."""
    stats = compiled.memory_analysis()
    names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes", "alias_size_in_bytes")
    return {name.removesuffix("_size_in_bytes"): round(getattr(stats, name) / 2**30, 3) for name in names}


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


class Step(NamedTuple):
    """What a GRPO step is made of, and a batch of its shape."""

    source: PolicySource
    generator: Generator
    trainer: Trainer
    state: TrainState
    batch: MicroBatch


class Prepared:
    """One model with random weights on the GPU, and what can be made of it."""

    def __init__(self, model: Model, shape: Shape):
        self.model, self.shape, self.vision = model, shape, model.config.vision
        self.base = random_params(model)
        self.features = self._store()
        self._rng, self._number = np.random.default_rng(0), 0

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

    def films(self) -> np.ndarray:
        keys = ["1"] * self.shape.prompts
        return np.stack(Pictures(self.vision.image_size, self.vision.tokens).read(keys))

    def _policy(self) -> dict[str, jax.Array]:
        """The base as rollouts have a merged policy: a copy of the decoder's matrices, joined."""
        matrices = {name: value for name, value in self.base.items() if is_projection(name)}
        return with_made(self.model, self.base, jax.jit(partial(joined, self.model))(matrices))

    def rows(self, rows: int, group: int, top_p: float) -> tuple[DeviceRows, Slots]:
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

    def state(self, trainer: Trainer) -> TrainState:
        return trainer.init(init_adapter(self.model.shapes, self.base, key=jax.random.key(0)))

    def lower_gradients(self, trainer: Trainer, batch: MicroBatch) -> jax.stages.Lowered:
        """As `Trainer.step` calls it."""
        state = jax.eval_shape(lambda: self.state(trainer))
        counts = trainer.objective.counts([batch.groups])
        known = dict(batch.recorded)
        if trainer.objective.needs_reference:
            known["ref_logp"] = jax.ShapeDtypeStruct(batch.groups.weight.shape, jnp.float32)
        return trainer._accumulate.lower(state.params, state.params, self.base, batch.groups, known, counts, state.step)

    def lower_optimiser(self, trainer: Trainer) -> jax.stages.Lowered:
        state = jax.eval_shape(lambda: self.state(trainer))
        return trainer._apply.lower(state, state.params, jax.ShapeDtypeStruct((), jnp.float32))

    def lower_reference(self, trainer: Trainer, batch: MicroBatch) -> jax.stages.Lowered:
        return trainer._reference_logp.lower(self.base, trainer.reference[1], batch.groups)

    def update(self, remat: str, attention: str, rows: int) -> tuple[Trainer, list[MicroBatch]]:
        """A trainer, and `prompts` groups in micro-batches of `rows`."""
        groups = [self._group(self.shape.group) for _ in range(self.shape.prompts)]
        model = Model(self.model.config, self.model.lora, self.model.dtype, attention, remat)
        shapes = Shapes(rows=rows, prompt_multiple=8, completion_multiple=8)
        size = (rows, self.shape.group, self.shape.completion)
        advantage = np.linspace(-1, 1, rows * self.shape.group, dtype=np.float32).reshape(size[:2])
        known = {name: np.full(size, -12.0, np.float32) for name in ("rollout_logp", "kept_logp")}
        batches = micro_batches(groups, shapes, self.features)
        return self._trainer(model, 0.0), [MicroBatch(b._replace(advantage=advantage), known) for b in batches]

    def step(self, rows: int) -> Step:
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

        shapes = Shapes(rows=rows, prompt_multiple=8, completion_multiple=8)
        source = PolicySource(
            [Task(self._group(0), "", {}) for _ in range(shape.prompts * 16)], generator=generator, trainer=trainer,
            base=self.base, decode=lambda tokens: " ".join(map(str, tokens.tolist())), score=score,
            shapes=shapes, settings=RolloutSettings(shape.prompts, scale="group"),
        )  # fmt: skip
        size = (rows, shape.group, shape.completion)
        known = {name: np.zeros(size, np.float32) for name in ("rollout_logp", "kept_logp")}
        groups = [self._group(shape.group) for _ in range(rows)]
        (batch,) = micro_batches(groups, shapes, self.features)
        batch = batch._replace(advantage=np.zeros(size[:2], np.float32), truncated=np.zeros(size[:2], bool))
        return Step(source, generator, trainer, trainer.init(start), MicroBatch(batch, known))
