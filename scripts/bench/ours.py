"""Our side of the training benchmarks: one call is one whole optimiser step on new data, as a training loop would make it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from PIL import Image
from shapes import Sizes, words
from transformers import AutoImageProcessor

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model
from vlmalign.objectives.dpo import DpoSettings
from vlmalign.objectives.grpo import GrpoSettings, grpo_counts, grpo_loss
from vlmalign.objectives.sft import sft_counts, sft_loss
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.training.optimiser import OptimiserSettings, build_optimiser
from vlmalign.training.policy import PolicySource
from vlmalign.training.preference import preference_objective
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import Task
from vlmalign.training.step import MicroBatch, Objective, Trainer
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.types import Grid, Group, Segment
from vlmalign.weights.checkpoint import load_config, load_params

ALWAYS = 10**6


class Pictures:
    """Images drawn as they are asked for, prepared by the checkpoint's own processor: every key is a new image."""

    def __init__(self, folder: Path, sizes: Sizes):
        self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
        self._sizes = sizes

    def grid(self, key: str) -> Grid:
        del key
        side = round(self._sizes.soft_tokens**0.5)
        return Grid(side, side)

    def read(self, keys: list[str]) -> list[np.ndarray]:
        side = self._sizes.image
        images = [
            Image.fromarray(np.random.default_rng(int(key)).integers(0, 255, (side, side, 3), dtype=np.uint8))
            for key in keys
        ]
        return [self._processor(image, return_tensors="np")["pixel_values"][0] for image in images]


class Bench:
    """A loaded checkpoint, and makers of steps."""

    def __init__(self, folder: Path, kind: str, sizes: Sizes, *, spare: int):
        """`spare`: tokens that the template and the image take of a prompt."""
        self.kind, self.sizes, self._spare = kind, sizes, spare
        config = load_config(folder)
        self.model = Model(config, lora=LoraSpec(sizes.rank, 2.0 * sizes.rank), dtype="float32")
        self.base = load_params(folder, self.model)
        self._pictures = Pictures(folder, sizes) if kind == "image" else None
        # One image a call: every step brings as many new ones as it has prompts.
        self.features = None
        if self._pictures is not None:
            self.features = FeatureStore(self.model, self.base, self._pictures, chunk=1)
        count = None if self._pictures is None else (lambda key: sizes.soft_tokens)
        self.chat: Chat = open_chat(folder, family=config.family, image_tokens=count)
        self._rng = np.random.default_rng(0)
        self._number = 0

    def _user(self) -> list[dict]:
        text = words(self._rng, self.sizes.prompt - self._spare, self.sizes)
        self._number += 1
        if self.kind == "text":
            return [{"role": "user", "content": text}]
        parts = [{"type": "image", "image": str(self._number)}, {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    def _prompt(self) -> Group:
        found = self.chat.prompt(self._user(), group_id=self._number)
        assert len(found.prompt) == self.sizes.prompt, len(found.prompt)
        return found

    def _answer(self, length: int) -> Segment:
        tokens = self._rng.integers(16, self.sizes.vocab, length).astype(np.int32)
        return Segment(tokens, np.full(length, -1, np.int32), np.ones(length, np.float32))

    def _trainer(self, objective: Objective) -> Trainer:
        optimiser = build_optimiser(OptimiserSettings(1e-4, warmup=0.0, schedule="constant"), ALWAYS)
        return Trainer(self.model, objective, optimiser, reference=(self.model.without_lora(), {}))

    def _step(self, trainer: Trainer, make: Callable[[], list[Group]], shapes: Shapes) -> Callable[[], None]:
        state = trainer.init(init_adapter(self.model.shapes, self.base, key=jax.random.key(0)))

        def step() -> None:
            nonlocal state
            batches = [MicroBatch(b, {}) for b in micro_batches(make(), shapes, self.features)]
            state, found = trainer.step(state, self.base, batches)
            jax.block_until_ready((state.params, found))

        return step

    def sft(self, batch: int) -> Callable[[], None]:
        """`batch` rows of `sizes.row` tokens: of text every token is learnt, of images those after the prompt."""

        def group() -> Group:
            if self.kind == "image":
                prompt = self._prompt()
                return Group(
                    prompt.id, prompt.prompt, (self._answer(self.sizes.row - self.sizes.prompt),), prompt.images
                )
            self._number += 1
            return Group(self._number, self._answer(1), (self._answer(self.sizes.row - 1),), ())

        lengths = (
            (1, self.sizes.row - 1) if self.kind == "text" else (self.sizes.prompt, self.sizes.row - self.sizes.prompt)
        )
        shapes = Shapes(rows=batch, prompt_multiple=lengths[0], completion_multiple=lengths[1])
        trainer = self._trainer(Objective("sft", sft_loss, sft_counts))
        return self._step(trainer, lambda: [group() for _ in range(batch)], shapes)

    def dpo(self, batch: int) -> Callable[[], None]:
        """`batch` pairs; the reference is the base, scored in the step as the peer does."""

        def group() -> Group:
            prompt = self._prompt()
            return Group(
                prompt.id, prompt.prompt, tuple(self._answer(self.sizes.answer) for _ in range(2)), prompt.images
            )

        shapes = Shapes(rows=batch, prompt_multiple=self.sizes.prompt, completion_multiple=self.sizes.answer)
        trainer = self._trainer(preference_objective(DpoSettings(), recorded=False))
        return self._step(trainer, lambda: [group() for _ in range(batch)], shapes)

    def grpo(self, group: int, prompts: int) -> Callable[[], None]:
        """Rollout, rewards, reference and update; completions run to the limit, as the peer's are made to."""
        settings = GrpoSettings(beta=0.04, loss="dapo", kl_unbiased=True, max_completion=self.sizes.completion)
        trainer = self._trainer(
            Objective(
                "grpo",
                lambda scores, batch: grpo_loss(scores, batch, settings=settings),
                lambda batches: grpo_counts(batches, settings=settings),
                needs_reference=True,
            )
        )
        generator = Generator(
            model=self.model.without_lora(), features=self.features, stop_ids=(), rows=prompts, group=group,
            completion=self.sizes.completion, sampling=Sampling(temperature=1.0), multiple=self.sizes.prompt,
        )  # fmt: skip
        tasks = [Task(self._prompt(), "", {}) for _ in range(prompts * 64)]

        def score(number, keys, texts, completions, columns) -> ScoredBatch:
            del number, keys, texts, columns
            rewards = [sum(int(w[1:]) % 2 for w in c.split() if w[1:].isdigit()) / 16.0 for c in completions]
            return ScoredBatch(rewards, {}, ())

        source = PolicySource(
            tasks, generator=generator, trainer=trainer, base=self.base, decode=self.chat.decode, score=score,
            shapes=Shapes(rows=prompts, prompt_multiple=self.sizes.prompt, completion_multiple=self.sizes.completion),
            settings=RolloutSettings(prompts, scale="group"),
        )  # fmt: skip
        state = trainer.init(init_adapter(self.model.shapes, self.base, key=jax.random.key(0)))
        done = 0

        def step() -> None:
            nonlocal state, done
            work = source.work(done, state.params)
            state, found = trainer.step(state, self.base, work.batches, work.options)
            jax.block_until_ready((state.params, found))
            done += 1

        return step
