"""A base model of a study: what reads texts for it, opened before any weight, and what computes, opened once.

Stages of kind model that name the same folder in the same way share one base. Trained parameters travel between stages as
`State`s, which a finished stage keeps as safetensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import jax.numpy as jnp

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.films.pixels import GIB, open_pixels
from vlmalign.data.films.prefetch import PrefetchReader
from vlmalign.data.films.reading import TwoStepReader
from vlmalign.mesh import Placement
from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model, Params
from vlmalign.models.network import DECODER
from vlmalign.progress import Progress
from vlmalign.randomness import key_for
from vlmalign.rollout.compaction import prompt_lengths
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.engine.devices import Devices, full_rows, open_devices
from vlmalign.studies.engine.sections import Mesh, Reading
from vlmalign.studies.engine.stage_config import ModelStage
from vlmalign.training.merged import merge_program
from vlmalign.types import Group
from vlmalign.weights.checkpoint import load_config, load_params


@dataclass(frozen=True)
class Front:
    """What reads texts and images for a checkpoint: no weights."""

    path: Path
    shape: ModelConfig
    chat: Chat
    pixels: TwoStepReader | None  #: None for a text model


@dataclass(frozen=True)
class State:
    """What a stage gives: trained parameters on a base; none of them: the base as it is."""

    params: Mapping[str, Any]
    spec: LoraSpec | None  #: of the adapter; None where the whole decoder is trained, or nothing yet

    @property
    def plain(self) -> bool:
        return not self.params


@dataclass(frozen=True)
class Base:
    """A loaded checkpoint and how it is run."""

    front: Front
    devices: Devices
    params: dict[str, Array]  #: of the whole checkpoint
    features: FeatureStore | None  #: None for a text model
    reader: PrefetchReader | None = None  #: reads images ahead; None: they are read when they are needed

    def model(self, spec: LoraSpec | None) -> Model:
        """With slots for this adapter."""
        if spec not in self._models:
            self._models[spec] = replace(self.devices.model, lora=spec)
        return self._models[spec]

    @cached_property
    def _models(self) -> dict[LoraSpec | None, Model]:
        return {None: self.devices.model}

    def frozen(self, spec: LoraSpec | None) -> Mapping[str, Array]:
        """What stages with this adapter do not train; with None they train the decoder."""
        if spec is not None:
            return self.params
        return {name: value for name, value in self.params.items() if not name.startswith(DECODER)}

    def start(self, state: State, spec: LoraSpec | None, seed: int, *, last: bool) -> dict[str, Array]:
        """The parameters that a stage begins to train. Training gives their buffers back as it goes: those of the state,
        which is of no use afterwards, and copies of the base's, unless nothing needs it as it is any more (`last`)."""
        if not state.plain:
            return dict(state.params)
        if spec is not None:
            return init_adapter(self.model(spec).shapes, self.params, key=key_for(seed, 0, "adapter"))
        decoder = [name for name in self.params if name.startswith(DECODER)]
        # The tower is called with all parameters, so a vision-language base keeps them.
        if last and self.features is None:
            return {name: self.params.pop(name) for name in decoder}
        return {name: self.params[name].copy() for name in decoder}

    def reference(self, state: State) -> tuple[Model, dict[str, Array]]:
        """A state as a frozen reference: a model, and the parameters it adds to the frozen ones of its stage."""
        if state.plain and self.devices.trains_whole:
            return self.model(None), {n: v.copy() for n, v in self.params.items() if n.startswith(DECODER)}
        if state.plain:
            return self.model(None), {}
        model = self.model(state.spec)
        return model, {name: jnp.array(value, model.shapes[name].dtype) for name, value in state.params.items()}

    def policy(self, state: State, where: Placement | None, *, decodes: bool = True) -> dict[str, Array]:
        """The whole model in this state, without adapter, as rollouts on `where` read it; with `decodes` False as scoring
        does."""
        if state.plain:
            return self.devices.bring(self.params, where)
        params = self.devices.place(self.model(state.spec), state.params)
        return self.devices.bring(
            self.merge(state.spec, where, decodes=decodes)(self.frozen(state.spec), params), where
        )

    def merge(
        self, spec: LoraSpec | None, where: Placement | None, *, decodes: bool = True
    ) -> Callable[[Params, Params], dict[str, Array]]:
        """(frozen, trained) -> the whole model, compiled once for each adapter and place."""
        key = (spec, where is None, decodes)
        if key not in self._merges:
            mesh = None if where is None else where.mesh
            self._merges[key] = merge_program(self.model(spec), self.devices.mesh, mesh, decodes=decodes)
        return self._merges[key]

    @cached_property
    def _merges(self) -> dict[tuple[LoraSpec | None, bool, bool], Callable[[Params, Params], dict[str, Array]]]:
        return {}

    def generator(
        self,
        prompts: Sequence[Group],
        *,
        rows: int,
        group: int,
        completion: int,
        multiple: int,
        sampling: Sampling,
        where: Placement | None,
    ) -> Generator:
        """What answers these prompts, on parameters that live `where` says (`Devices.sampling`)."""
        return Generator(
            model=self.model(None),
            features=self.features,
            stop_ids=self.front.chat.stop_ids,
            rows=full_rows(rows, where),
            group=group,
            completion=completion,
            sampling=replace(sampling, never=self.front.chat.never_drawn(self.front.shape.decoder.vocab)),
            multiple=multiple,
            images=max(1, most_images(prompts)),
            mesh=None if where is None else where.mesh,
            prompt_lengths=prompt_lengths([len(group.prompt) for group in prompts], multiple=multiple),
        )

    def close(self) -> None:
        """End the processes that read images."""
        if self.reader is not None:
            self.reader.close()


def most_images(groups: Sequence[Group]) -> int:
    """Most distinct images of a group."""
    return max((len(group.images) for group in groups), default=0)


def open_front(
    path: Path, reading: Reading, run: Path, where: str, bits: Mapping[Path, int] = {}, now: datetime | None = None
) -> Front:
    """The chat and image side of a checkpoint folder; `where` is its place in the config, `run` the run's folder, `bits`
    how many bits the 16-bit films below a folder use, `now` the time that a chat template is told.

    Raises:
        ValueError: when anything in it does not fit.
    """
    if not path.is_dir():
        raise ValueError(f"{where}: there is no folder {path}; give a checkpoint folder on this machine")
    shape = load_config(path)
    pixels = None
    if shape.vision is not None:
        pixels = open_pixels(
            path,
            family=shape.family,
            image_tokens=shape.vision.tokens,
            cache=reading.cache_folder(run),
            cache_bytes=int(reading.resize_cache_gib * GIB),
            bits=bits,
        )
    chat = open_chat(
        path,
        family=shape.family,
        image_tokens=None if pixels is None else lambda key: pixels.grid(key).tokens,
        vocab=shape.decoder.vocab,
        now=now,
    )
    return Front(path, shape, chat, pixels)


def base_devices(section: ModelStage, front: Front, mesh: Mesh | None, *, whole: bool) -> Devices:
    """Where the model of a stage of kind model lives; `whole`: its decoder is trained by some stage."""
    model = Model(front.shape, lora=None, dtype=section.dtype, attention=section.attention, remat=section.remat)
    return open_devices(mesh, model, whole=whole)


def open_base(front: Front, devices: Devices, reading: Reading, progress: Progress) -> Base:
    """Load the checkpoint straight to its devices.

    Raises:
        ValueError: naming every tensor of the folder that does not fit.
    """
    said = -1

    def advance(done: int, total: int) -> None:
        nonlocal said
        if said < 0:
            progress.stage("load model, MiB", -(-total >> 20))
        read = -(-done >> 20)
        if read > said:  # tensors are many and some are small, and a log file has a line for each call at the end
            said = read
            progress.update(read)

    params = load_params(front.path, devices.model, sharding=devices.training, advance=advance)
    reader = features = None
    if front.pixels is not None:
        own, mesh = devices.encoding(params)
        if reading.workers:
            reader = PrefetchReader(front.pixels, workers=reading.workers, ahead=reading.ahead)
        features = FeatureStore(
            devices.model,
            own,
            reader or front.pixels,
            announce=None if reader is None else reader.expect,
            mesh=mesh,
            peers=devices.peers(),
        )
    return Base(front, devices, dict(params), features, reader)
