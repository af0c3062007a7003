"""The model side of a run, opened once: base parameters, chat, image features, and generators of answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from vlmalign.data.answers import film_question
from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.films.pixels import GIB, open_pixels
from vlmalign.data.films.prefetch import PrefetchReader
from vlmalign.mesh import Placement, row_shares
from vlmalign.models.lora import LoraSpec
from vlmalign.models.model import Model, Params
from vlmalign.progress import Progress
from vlmalign.randomness import key_for
from vlmalign.rollout.compaction import prompt_lengths
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array
from vlmalign.studies.chexreason.config import Batch, ChexReasonConfig
from vlmalign.studies.devices import Devices, full_rows, open_devices
from vlmalign.training.merged import merge_program
from vlmalign.training.shared_rollouts import Answer, share_out
from vlmalign.training.supervised import Shapes
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
    devices: Devices
    sampling: Placement | None  #: where rollouts and evaluation read their parameters; None: one device

    def question(self, example: Example, number: int) -> Group:
        """The prompt about one film; `number` is what its sampling keys are derived from."""
        return self.chat.prompt(film_question(str(example.image), self.prompt), group_id=number)

    def generator(
        self, prompts: Sequence[Group], *, rows: int, group: int, completion: int, multiple: int, sampling: Sampling
    ) -> Generator:
        """What answers these prompts."""
        return Generator(
            model=self.model.without_lora(),
            features=self.features,
            stop_ids=self.chat.stop_ids,
            rows=full_rows(rows, self.sampling),
            group=group,
            completion=completion,
            sampling=sampling,
            multiple=multiple,
            mesh=None if self.sampling is None else self.sampling.mesh,
            prompt_lengths=prompt_lengths([len(group.prompt) for group in prompts], multiple=multiple),
        )

    def answer(
        self,
        generator: Generator,
        params: Params,
        prompts: Sequence[Group],
        *,
        seed: int,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Answer]:
        """One answer to each prompt, in order; several processes share them out, and all get all.

        `advance(n)` is called as n more prompts of this process's share are done.
        """

        def own(share: Sequence[Group]) -> list[list[Answer]]:
            rows = generator.run(params, share, key_for(seed, 0, "rollout"), advance=advance)
            return [[Answer(found, self.chat.decode(found.tokens)) for found in row] for row in rows]

        return [answer for (answer,) in share_out(prompts, own)]

    def close(self) -> None:
        """End the processes that read films."""
        if self.reader is not None:
            self.reader.close()

    def shapes(self, settings: Batch) -> Shapes:
        """How groups become arrays on the devices of training."""
        return Shapes(**settings.model_dump(), shares=row_shares(self.devices.mesh))

    def policy(self, adapter: Mapping[str, Array] | None) -> dict[str, Array]:
        """The base with this adapter merged (None: as it is), where rollouts read it."""
        return self.bring(self.base if adapter is None else self._merge(self.base, adapter))

    def bring(self, params: Mapping[str, Array]) -> dict[str, Array]:
        """Parameters without adapter, from where training left them to where rollouts read them."""
        return self.devices.bring(params, self.sampling)

    @cached_property
    def _merge(self) -> Callable[[Params, Params], dict[str, Array]]:
        return merge_program(self.model, self.devices.mesh, None if self.sampling is None else self.sampling.mesh)


def open_system(config: ChexReasonConfig, progress: Progress) -> System:
    """Load the checkpoint folder of the config.

    Raises:
        ValueError: when it is no vision-language model, or anything in the folder does not fit.
    """
    settings = config.model
    shape = load_config(settings.path)
    if shape.vision is None:
        raise ValueError(f"{settings.path} has no vision tower; ChexReason needs a vision-language checkpoint")
    devices = choose_devices(config)
    model, begun = devices.model, False

    def advance(done: int, total: int) -> None:
        nonlocal begun
        if not begun:
            progress.stage("load model, MiB", total >> 20)
            begun = True
        progress.update(done >> 20)

    base = load_params(settings.path, model, sharding=devices.training, advance=advance)
    reading = config.data.reading
    pixels = open_pixels(
        settings.path,
        family=shape.family,
        image_tokens=shape.vision.tokens,
        cache=reading.cache_folder(config.run),
        cache_bytes=int(reading.resize_cache_gib * GIB),
    )
    chat = open_chat(
        settings.path,
        family=shape.family,
        image_tokens=lambda key: pixels.grid(key).tokens,
        vocab=shape.decoder.vocab,
    )
    reader = None
    if reading.workers:
        reader = PrefetchReader(pixels, workers=reading.workers, ahead=reading.ahead)
    params, mesh = devices.encoding(base)
    announce = None if reader is None else reader.expect
    features = FeatureStore(model, params, reader or pixels, announce=announce, mesh=mesh, peers=devices.peers())
    sampling = devices.sampling(config.grpo.rollout.tensor)
    return System(model, base, chat, features, config.prompt, reader, devices, sampling)


def choose_devices(config: ChexReasonConfig) -> Devices:
    """Where the config's model, with its adapter, will live; no weights are read.

    Raises:
        ValueError: when the mesh does not fit the devices or the model; naming the setting, when rows do not share out.
    """
    settings = config.model
    lora = LoraSpec(**settings.lora.model_dump())
    model = Model(
        load_config(settings.path), lora=lora, dtype=settings.dtype, attention=settings.attention, remat=settings.remat
    )
    devices = open_devices(config.mesh, model)
    devices.require_rows(config.sft.shapes.rows, "sft.shapes.rows")
    devices.require_rows(config.grpo.shapes.rows, "grpo.shapes.rows")
    rollout = config.grpo.rollout
    devices.require_rows(rollout.rows, "grpo.rollout.rows", tensor=rollout.tensor)
    return devices
