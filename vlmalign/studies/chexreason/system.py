"""The model side of a run, opened once: base parameters, chat, image features, and generators of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax

from vlmalign.data.answers import film_question
from vlmalign.data.chat import Chat, open_chat
from vlmalign.data.pixels import GIB, open_pixels
from vlmalign.data.prefetch import PrefetchReader
from vlmalign.models.lora import LoraSpec, merge_adapter
from vlmalign.models.model import Model
from vlmalign.progress import Progress
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.types import Example, Group
from vlmalign.weights.checkpoint import load_config, load_params


@dataclass(frozen=True)
class System:
    """A loaded vision-language checkpoint with the adapter's settings."""

    model: Model  #: with adapter slots
    base: Mapping[str, Array]
    chat: Chat
    features: FeatureStore
    prompt: str
    reader: PrefetchReader | None  #: None: films are read when they are needed

    def question(self, example: Example, number: int) -> Group:
        """The prompt about one film; `number` is what its sampling keys are derived from."""
        return self.chat.prompt(film_question(str(example.image), self.prompt), group_id=number)

    def generator(self, *, rows: int, group: int, completion: int, multiple: int, sampling: Sampling) -> Generator:
        return Generator(
            model=self.model.without_lora(),
            features=self.features,
            stop_ids=self.chat.stop_ids,
            rows=rows,
            group=group,
            completion=completion,
            sampling=sampling,
            multiple=multiple,
        )

    def close(self) -> None:
        """End the processes that read films."""
        if self.reader is not None:
            self.reader.close()

    @cached_property
    def merge(self):
        """Adapter -> parameters of the model without adapter."""
        return jax.jit(lambda adapter: merge_adapter(self.base, adapter, self.model.lora.scale))


def open_system(config: ChexReasonConfig, progress: Progress) -> System:
    """Load the checkpoint folder of the config.

    Raises:
        ValueError: when it is no vision-language model, or anything in the folder does not fit.
    """
    settings = config.model
    shape = load_config(settings.path)
    if shape.vision is None:
        raise ValueError(f"{settings.path} has no vision tower; ChexReason needs a vision-language checkpoint")
    lora = LoraSpec(**settings.lora.model_dump())
    model = Model(shape, lora=lora, dtype=settings.dtype, attention=settings.attention, remat=settings.remat)
    begun = False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            progress.stage("load model, MiB", total >> 20)
            begun = True
        progress.update(done >> 20)

    base = load_params(settings.path, model, advance=advance)
    reading = config.data.reading
    pixels = open_pixels(
        settings.path,
        family=shape.family,
        image_tokens=shape.vision.tokens,
        cache=None if reading.resize_cache is None else config.place(reading.resize_cache),
        cache_bytes=int(reading.resize_cache_gib * GIB),
    )
    chat = open_chat(
        settings.path,
        family=shape.family,
        image_tokens=lambda key: pixels.grid(key).tokens,
        vocab=shape.decoder.vocab,
    )
    if not reading.workers:
        return System(model, base, chat, FeatureStore(model, base, pixels), config.prompt, None)
    reader = PrefetchReader(pixels, workers=reading.workers, ahead=reading.ahead)
    features = FeatureStore(model, base, reader, announce=reader.expect)
    return System(model, base, chat, features, config.prompt, reader)
