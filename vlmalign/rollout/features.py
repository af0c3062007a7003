"""Image features, encoded once per distinct image and kept on the host while the tower is frozen."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import jax
import numpy as np

from vlmalign.models.model import Model, Params
from vlmalign.shapes import Float
from vlmalign.types import GroupBatch


class FeatureStore:
    """Soft tokens by image key, least recently used out first.

    `encoded` counts images that went through the tower: on a steady working set it equals the number of distinct
    images, whatever the number of prompts, completions and passes.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        read_pixels: Callable[[Sequence[str]], np.ndarray],
        *,
        capacity: int = 100_000,
        chunk: int = 16,
    ):
        """`read_pixels(keys)` gives [i, channel, height, width]; `capacity` is in images; `chunk` images per call."""
        self._model = model.without_lora()
        self._params = params
        self._encode = jax.jit(self._model.encode)
        self._read = read_pixels
        self._capacity, self._chunk = capacity, chunk
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        self.encoded = 0

    @property
    def tokens(self) -> int:
        """Soft tokens per image."""
        return self._model.config.vision.tokens

    def image_tokens(self, key: str) -> int:
        """Soft tokens of one image, as `collate` asks for them."""
        del key
        return self.tokens

    def features(self, keys: Sequence[str]) -> Float[np.ndarray, "i tokens embed"]:
        """Features of these images in this order; those not held are read and encoded, `chunk` at a time."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._held]
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(missing), self._chunk):
            part = missing[start : start + self._chunk]
            pixels = self._read(part)
            # One static shape: the last call repeats its final image instead of compiling for a smaller batch.
            pixels = np.concatenate([pixels, np.repeat(pixels[-1:], self._chunk - len(part), axis=0)])
            found.update(zip(part, np.asarray(self._encode(self._params, pixels))[: len(part)], strict=True))
        self.encoded += len(missing)
        for key in dict.fromkeys(keys):
            value = found[key] if key in found else self._held[key]
            found[key] = value
            self._held[key] = value
            self._held.move_to_end(key)
        while len(self._held) > self._capacity:
            self._held.popitem(last=False)
        return np.stack([found[key] for key in keys])

    def attach(self, batch: GroupBatch, keys: Sequence[str], *, images: int) -> GroupBatch:
        """The batch with the features of its distinct images, padded to `images` of them."""
        if len(keys) > images:
            raise ValueError(f"a batch with {len(keys)} distinct images does not fit {images}; raise the rows' images")
        if not images:
            return batch
        width = self._model.config.decoder.embed
        dtype = np.dtype(self._model.shapes["language_model.embed_tokens.weight"].dtype)
        features = np.zeros((images, self.tokens, width), dtype)
        if keys:
            features[: len(keys)] = self.features(keys)
        return batch._replace(features=features.reshape(-1, width))
