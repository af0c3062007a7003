"""The model side of a run: what reads its rows, opened before any weight, and what computes, opened once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from vlmalign.data.chat import Chat, open_chat
from vlmalign.data.pixels import PixelReader, open_pixels
from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model
from vlmalign.progress import Progress
from vlmalign.randomness import key_for
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.align.config import Model as Settings
from vlmalign.weights.adapter import Adapter, load_adapter
from vlmalign.weights.checkpoint import load_config, load_params

#: parameters that full fine-tuning trains: the decoder; towers and projectors stay as they are
DECODER = ("language_model.", "lm_head.")


class Front(NamedTuple):
    """What reads the rows: no weights."""

    shape: ModelConfig
    chat: Chat
    pixels: PixelReader | None  #: None for a text model
    adapter: Adapter | None  #: to go on from


class Trained(NamedTuple):
    """What a stage starts from, and what it ends with."""

    params: dict[str, Array]  #: the trained ones
    fresh: bool  #: an adapter that has learnt nothing yet: the policy is the base


@dataclass(frozen=True)
class System:
    """A loaded checkpoint and how it is run."""

    model: Model  #: with adapter slots, unless the whole decoder is trained
    frozen: Mapping[str, Array]  #: what no stage trains
    features: FeatureStore | None  #: None for a text model
    front: Front

    def reference(self, start: Trained) -> tuple[Model, dict[str, Array]]:
        """What a stage starts from as a frozen reference: a model, and the parameters it adds to the frozen ones.

        A copy: training gives the buffers of what it starts from back as it goes.
        """
        if start.fresh:
            return self.model.without_lora(), {}
        shapes = self.model.shapes
        return self.model, {name: jnp.array(value, shapes[name].dtype) for name, value in start.params.items()}

    def generator(
        self, *, rows: int, group: int, completion: int, multiple: int, images: int, sampling: Sampling
    ) -> Generator:
        return Generator(
            model=self.model.without_lora(),
            features=self.features,
            stop_ids=self.front.chat.stop_ids,
            rows=rows,
            group=group,
            completion=completion,
            sampling=sampling,
            multiple=multiple,
            images=images,
        )


def open_front(settings: Settings) -> Front:
    """The chat, image and adapter side of the config's folders.

    Raises:
        ValueError: when anything in them does not fit, or the adapter's settings are not those of the config.
    """
    if not settings.path.is_dir():
        raise ValueError(f"model.path: there is no folder {settings.path}; give a checkpoint folder on this machine")
    shape = load_config(settings.path)
    pixels = None
    if shape.vision is not None:
        pixels = open_pixels(settings.path, family=shape.family, image_tokens=shape.vision.tokens)
    chat = open_chat(
        settings.path,
        family=shape.family,
        image_tokens=None if pixels is None else lambda key: pixels.grid(key).tokens,
        vocab=shape.decoder.vocab,
    )
    adapter = None if settings.adapter is None else load_adapter(settings.adapter, shape)
    if adapter is not None:
        _check_adapter(settings, adapter.spec)
    return Front(shape, chat, pixels, adapter)


def _check_adapter(settings: Settings, spec: LoraSpec) -> None:
    """What the tensors mean must be said in the config too: exports and reports read it there."""
    names = ("rank", "alpha", "targets", "rank_stabilised", "magnitude")
    differ = [name for name in names if getattr(settings.lora, name) != getattr(spec, name)]
    if differ:
        rest = ", ".join(f"{name}: {getattr(spec, name)!r}" for name in names)
        raise ValueError(
            f"model.lora must be as in the adapter {settings.adapter}, found another {', '.join(differ)}; "
            f"the adapter has {rest.replace('(', '[').replace(')', ']')}"
        )


def open_system(config: AlignConfig, front: Front, progress: Progress) -> tuple[System, Trained]:
    """Load the checkpoint; and what the first stage starts from.

    Raises:
        ValueError: naming every tensor of the folder that does not fit.
    """
    settings = config.model
    lora = None if settings.lora is None else LoraSpec(**settings.lora.model_dump())
    model = Model(front.shape, lora=lora, dtype=settings.dtype, attention=settings.attention, remat=settings.remat)
    said = -1

    def advance(done: int, total: int) -> None:
        nonlocal said
        if said < 0:
            progress.stage("load model, MiB", -(-total >> 20))
        read = -(-done >> 20)
        if read > said:  # tensors are many and some are small, and a log file has a line for each call at the end
            said = read
            progress.update(read)

    base = load_params(settings.path, model, advance=advance)
    features = None if front.pixels is None else FeatureStore(model, base, front.pixels)
    if lora is not None:
        if front.adapter is not None:
            return System(model, base, features, front), Trained(dict(front.adapter.params), fresh=False)
        adapter = init_adapter(model.shapes, base, key=key_for(config.seed, 0, "adapter"))
        return System(model, base, features, front), Trained(adapter, fresh=True)
    trained = {name: value for name, value in base.items() if name.startswith(DECODER)}
    if features is not None:
        # The tower is called with all parameters, and those that training starts from are given up.
        trained = {name: value.copy() for name, value in trained.items()}
    frozen = {name: value for name, value in base.items() if name not in trained}
    return System(model, frozen, features, front), Trained(trained, fresh=False)
