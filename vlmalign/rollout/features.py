"""Image features, encoded once per distinct image and kept on the host while the tower is frozen."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh

from vlmalign.data.groups import collate, round_up
from vlmalign.mesh import on_mesh, put_rows, put_whole, replicated, row_shares
from vlmalign.models.config import QwenVisionConfig
from vlmalign.models.model import Model, Params
from vlmalign.models.qwen_vision import Windows
from vlmalign.models.towers import Picture, Pixels, arrange, size_class
from vlmalign.shapes import Array, Float
from vlmalign.types import Grid, Group, GroupBatch, Layout

GIB = 2**30


@runtime_checkable
class Pictures(Protocol):
    """Where images come from (`data.pixels.open_pixels`)."""

    def grid(self, key: str) -> Grid:
        """How the soft tokens of an image lie, known without decoding it."""
        ...

    def read(self, keys: list[str]) -> list[Picture]:
        """The images, as the checkpoint's processor prepares them."""
        ...


class FeatureStore:
    """Soft tokens by image key, least recently used out first.

    `encoded` counts images that went through the tower: on a steady working set it equals the number of distinct
    images, whatever the number of prompts, completions and passes.
    """

    def __init__(
        self,
        model: Model,
        params: Params,
        pictures: Pictures,
        *,
        capacity_bytes: int = 16 * GIB,
        chunk: int = 16,
        announce: Callable[[Sequence[str]], None] | None = None,
        mesh: Mesh | None = None,
    ):
        """`capacity_bytes` of host memory are held at most; `chunk` images of like size go through the tower at once.

        `announce` is told, in order, of images that `pictures` will be asked for (`data.prefetch.PrefetchReader`).
        With a `mesh`, on which `params` live, its devices share the images of a chunk out among them.
        """
        self._model = model.without_lora()
        self._params, self._mesh = params, mesh
        # Whole everywhere: every process keeps the features of every image.
        whole = {} if mesh is None else {"out_shardings": replicated(mesh)}
        self._program = jax.jit(self._model.encode, **whole)
        self._pictures, self._announce = pictures, announce
        self._capacity, self._chunk = capacity_bytes, round_up(chunk, row_shares(mesh))
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0
        self.encoded = 0

    @property
    def position_axes(self) -> int:
        """Coordinates of a rotary position in the model's batches."""
        return self._model.config.decoder.position_axes

    def grid(self, key: str) -> Grid:
        """How the soft tokens of one image lie."""
        return self._pictures.grid(key)

    def expect(self, keys: Sequence[str]) -> None:
        """These images will be asked for soon: those not held are read ahead, where the reader can do that."""
        if self._announce is not None:
            self._announce([key for key in keys if key not in self._held])

    def features(self, keys: Sequence[str]) -> list[Float[np.ndarray, "tokens embed"]]:
        """Features of these images in this order; those not held are read and encoded, `chunk` at a time."""
        missing = [key for key in dict.fromkeys(keys) if key not in self._held]
        found = self._encode_missing(missing)
        self.encoded += len(missing)
        for key in dict.fromkeys(keys):
            if key in self._held:
                found[key] = self._held[key]
            else:
                self._held[key] = found[key]
                self._bytes += found[key].nbytes
            self._held.move_to_end(key)
        while self._bytes > self._capacity:
            self._bytes -= self._held.popitem(last=False)[1].nbytes
        return [found[key] for key in keys]

    def _encode(self, pixels: Pixels) -> Array:
        if isinstance(pixels, Windows):  # `order` has an entry per soft token, all others a row per image
            cut = put_rows(pixels._replace(order=None), self._mesh)
            pixels = cut._replace(order=put_whole(pixels.order, self._mesh))
        else:
            pixels = put_rows(pixels, self._mesh)
        return on_mesh(self._program, self._mesh)(self._params, pixels)

    def _encode_missing(self, missing: list[str]) -> dict[str, np.ndarray]:
        vision = self._model.config.vision
        waiting: dict[int, list[tuple[str, Picture]]] = defaultdict(list)
        found: dict[str, np.ndarray] = {}

        def encode(part: list[tuple[str, Picture]]) -> None:
            # One static shape: the last call repeats its final image instead of compiling for a smaller batch.
            pictures = [picture for _, picture in part] + [part[-1][1]] * (self._chunk - len(part))
            flat = np.asarray(self._encode(arrange(vision, pictures)))
            start = 0
            for key, _ in part:
                tokens = self.grid(key).tokens
                # A copy: a slice would keep the features of the whole call alive.
                found[key] = flat[start : start + tokens].copy()
                start += tokens

        if self._announce is not None:
            self._announce(missing)  # so that the next ones are read while the tower works on a chunk
        for start in range(0, len(missing), self._chunk):
            keys = missing[start : start + self._chunk]
            for key, picture in zip(keys, self._pictures.read(keys), strict=True):
                if isinstance(vision, QwenVisionConfig):
                    found_grid = Grid(picture.rows // vision.merge, picture.columns // vision.merge)
                    if found_grid != self.grid(key):
                        # The features of the next image would be taken for its own.
                        raise ValueError(
                            f"image {key} was read as {found_grid.rows} x {found_grid.columns} soft tokens, its grid said "
                            f"{self.grid(key).rows} x {self.grid(key).columns}; the image settings do not fit the tower, "
                            "or the file has changed"
                        )
                alike = waiting[size_class(vision, picture)]
                alike.append((key, picture))
                if len(alike) == self._chunk:
                    encode(alike)
                    alike.clear()
        for alike in waiting.values():
            if alike:
                encode(alike)
        return found

    def attach(self, batch: GroupBatch, keys: Sequence[str], *, images: int) -> GroupBatch:
        """The batch with the features of its distinct images, with room for `images` of them.

        Where images differ in size, the room is the next power of two of their soft tokens: few shapes, few programs.
        """
        if len(keys) > images:
            raise ValueError(f"a batch with {len(keys)} distinct images does not fit {images}; raise the rows' images")
        if not images:
            return batch
        fixed = self._model.config.vision.tokens
        total = sum(self.grid(key).tokens for key in keys)
        room = images * fixed if fixed is not None else 1 << max(6, (total - 1).bit_length())
        dtype = np.dtype(self._model.shapes["language_model.embed_tokens.weight"].dtype)
        features = np.zeros((room, self._model.config.decoder.embed), dtype)
        if keys:
            features[:total] = np.concatenate(self.features(keys))
        return batch._replace(features=features)


def assemble(
    groups: Sequence[Group], layout: Layout, *, rows: int, images: int, features: FeatureStore | None
) -> GroupBatch:
    """Groups as one batch of `rows` rows with the features of at most `images` distinct images."""
    if features is None:
        return collate(groups, layout, rows=rows, grid=None)[0]
    batch, keys = collate(groups, layout, rows=rows, grid=features.grid, position_axes=features.position_axes)
    return features.attach(batch, keys, images=images)
