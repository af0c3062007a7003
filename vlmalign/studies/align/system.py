"""The model side of a run: what reads its rows, opened before any weight, and what computes, opened once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.films.pixels import GIB, open_pixels
from vlmalign.data.films.prefetch import PrefetchReader
from vlmalign.data.films.reading import TwoStepReader
from vlmalign.mesh import Placement
from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model
from vlmalign.models.network import DECODER
from vlmalign.progress import Progress
from vlmalign.randomness import key_for
from vlmalign.rollout.compaction import prompt_lengths
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.align.config import Model as Settings
from vlmalign.studies.devices import Devices, full_rows
from vlmalign.studies.run_config import Reading
from vlmalign.types import Group
from vlmalign.weights.adapter import Adapter, load_adapter
from vlmalign.weights.checkpoint import load_config, load_params


class Front(NamedTuple):
    """What reads the rows: no weights."""

    shape: ModelConfig
    chat: Chat
    pixels: TwoStepReader | None  #: None for a text model
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
    devices: Devices
    reader: PrefetchReader | None = None  #: reads images ahead; None: they are read when they are needed

    def reference(self, start: Trained) -> tuple[Model, dict[str, Array]]:
        """What a stage starts from as a frozen reference: a model, and the parameters it adds to the frozen ones.

        A copy: training gives the buffers of what it starts from back as it goes.
        """
        if start.fresh:
            return self.model.without_lora(), {}
        shapes = self.model.shapes
        return self.model, {name: jnp.array(value, shapes[name].dtype) for name, value in start.params.items()}

    def generator(
        self,
        prompts: Sequence[Group],
        *,
        rows: int,
        group: int,
        completion: int,
        multiple: int,
        images: int,
        sampling: Sampling,
        where: Placement | None,
    ) -> Generator:
        """What answers these prompts, on parameters that live `where` says (`Devices.sampling`)."""
        return Generator(
            model=self.model.without_lora(),
            features=self.features,
            stop_ids=self.front.chat.stop_ids,
            rows=full_rows(rows, where),
            group=group,
            completion=completion,
            sampling=sampling,
            multiple=multiple,
            images=images,
            mesh=None if where is None else where.mesh,
            prompt_lengths=prompt_lengths([len(group.prompt) for group in prompts], multiple=multiple),
        )

    def close(self) -> None:
        """End the processes that read images."""
        if self.reader is not None:
            self.reader.close()


def open_front(settings: Settings, reading: Reading = Reading(), run: Path = Path()) -> Front:
    """The chat, image and adapter side of the config's folders; `run` is the run's.

    Raises:
        ValueError: when anything in them does not fit, or the adapter's settings are not those of the config.
    """
    if not settings.path.is_dir():
        raise ValueError(f"model.path: there is no folder {settings.path}; give a checkpoint folder on this machine")
    shape = load_config(settings.path)
    pixels = None
    if shape.vision is not None:
        pixels = open_pixels(
            settings.path,
            family=shape.family,
            image_tokens=shape.vision.tokens,
            cache=reading.cache_folder(run),
            cache_bytes=int(reading.resize_cache_gib * GIB),
        )
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


def open_model(settings: Settings, front: Front) -> Model:
    """The model of the config, without its weights."""
    lora = None if settings.lora is None else LoraSpec(**settings.lora.model_dump())
    return Model(front.shape, lora=lora, dtype=settings.dtype, attention=settings.attention, remat=settings.remat)


def open_system(config: AlignConfig, front: Front, devices: Devices, progress: Progress) -> tuple[System, Trained]:
    """Load the checkpoint straight to its devices; and what the first stage starts from.

    Raises:
        ValueError: naming every tensor of the folder that does not fit.
    """
    model, said = devices.model, -1

    def advance(done: int, total: int) -> None:
        nonlocal said
        if said < 0:
            progress.stage("load model, MiB", -(-total >> 20))
        read = -(-done >> 20)
        if read > said:  # tensors are many and some are small, and a log file has a line for each call at the end
            said = read
            progress.update(read)

    base = load_params(config.model.path, model, sharding=devices.training, advance=advance)
    reader = features = None
    if front.pixels is not None:
        params, mesh = devices.encoding(base)
        if config.reading.workers:
            reader = PrefetchReader(front.pixels, workers=config.reading.workers, ahead=config.reading.ahead)
        announce = None if reader is None else reader.expect
        features = FeatureStore(
            model, params, reader or front.pixels, announce=announce, mesh=mesh, peers=devices.peers()
        )
    if model.lora is not None:
        system = System(model, base, features, front, devices, reader)
        if front.adapter is not None:
            return system, Trained(dict(front.adapter.params), fresh=False)
        return system, Trained(init_adapter(model.shapes, base, key=key_for(config.seed, 0, "adapter")), fresh=True)
    trained = {name: value for name, value in base.items() if name.startswith(DECODER)}
    if features is not None:
        # The tower is called with all parameters, and those that training starts from are given up.
        trained = {name: value.copy() for name, value in trained.items()}
    frozen = {name: value for name, value in base.items() if name not in trained}
    return System(model, frozen, features, front, devices, reader), Trained(trained, fresh=False)
