"""Opening a checkpoint folder: first everything that can be wrong without reading a weight, then the weights."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from vlmalign.api.loaded import LoadedModel
from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.films.pixels import open_pixels
from vlmalign.data.films.reading import PixelReader
from vlmalign.exporting.sources import Found, check_base, open_adapter
from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import LoraSpec, init_adapter
from vlmalign.models.model import Model
from vlmalign.randomness import key_for
from vlmalign.rollout.features import FeatureStore
from vlmalign.weights.checkpoint import load_config, load_params, stored_dtype


@dataclass(frozen=True)
class Front:
    """What a checkpoint reads and writes with, and the adapter on it: everything but its weights."""

    folder: Path
    config: ModelConfig
    chat: Chat
    pixels: PixelReader | None  #: None for a text model
    adapter: Found | None

    def load(
        self, *, lora: LoraSpec | None = None, dtype: str = "auto", remat: str = "none", seed: int = 0
    ) -> LoadedModel:
        """The model with its weights; the arguments are those of `load`."""
        if lora is not None and self.adapter is not None:
            raise ValueError(
                f"a new adapter (lora) and the one in {self.adapter.words} exclude each other: train the one you have, "
                "or export it merged and begin another on that"
            )
        spec = lora if self.adapter is None else self.adapter.spec
        dtype = stored_dtype(self.folder) if dtype == "auto" else dtype
        model = Model(self.config, lora=spec, dtype=dtype, remat=remat)
        base = load_params(self.folder, model)
        features = None if self.pixels is None else FeatureStore(model, base, self.pixels)
        trained = {}
        if self.adapter is not None:
            trained = self.adapter.params
        elif lora is not None:
            trained = init_adapter(model.shapes, base, key=key_for(seed, 0, "adapter"))
        return LoadedModel(self.folder, model, base, trained, self.chat, features)


def open_front(folder: str | PathLike[str], adapter: str | PathLike[str] | None = None) -> Front:
    """The tokenizer, image and adapter side of a checkpoint folder.

    Raises:
        ValueError: when there is no such folder, something in it does not fit, or the adapter is another model's.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}; give a checkpoint folder on this machine")
    config = load_config(folder)
    pixels = None
    if config.vision is not None:
        pixels = open_pixels(folder, family=config.family, image_tokens=config.vision.tokens)
    chat = open_chat(
        folder,
        family=config.family,
        image_tokens=None if pixels is None else lambda key: pixels.grid(key).tokens,
        vocab=config.decoder.vocab,
    )
    found = None
    if adapter is not None:
        check_base(Path(adapter), folder)
        found = open_adapter(Path(adapter), config)
    return Front(folder, config, chat, pixels, found)


def load(
    folder: str | PathLike[str],
    *,
    adapter: str | PathLike[str] | None = None,
    lora: LoraSpec | None = None,
    dtype: str = "auto",
    remat: str = "none",
    seed: int = 0,
) -> LoadedModel:
    """A checkpoint folder, ready to score, to sample and to be trained, on JAX's default device.

    Args:
        folder: a Hugging Face checkpoint with its tokenizer, of a family that vlmalign knows.
        adapter: a PEFT folder, or a stage's folder of a run, to go on from.
        lora: a new adapter, which changes nothing until it is trained. With neither, `train` trains the whole decoder.
        dtype: of the weights and activations: float32, bfloat16, or "auto": as the folder was saved.
        remat: what the backward pass computes again to save memory: "none", or another key of `models.decoder.REMAT`.
        seed: of the new adapter's first values.

    Raises:
        ValueError: when there is no such folder, something in it does not fit, or the adapter is another model's.
    """
    return open_front(folder, adapter).load(lora=lora, dtype=dtype, remat=remat, seed=seed)
