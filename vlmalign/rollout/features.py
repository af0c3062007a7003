"""Image features, encoded once per distinct image and kept on the host while the tower is frozen.

Of several processes each encodes the images that it meets alone (in its share of the prompts). For a batch of all of them
an image is encoded by one, and told to the others.
"""

from __future__ import annotations

import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

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


@dataclass(frozen=True)
class Peers:
    """The processes of a run that encode together."""

    index: int  #: which of them this is
    count: int
    #: what a function returns in each of them, in their order (`exchange.gather_from`)
    gather_from: Callable[[Callable[[], Sequence[Any]]], list[Any]]


ALONE = Peers(0, 1, lambda make: list(make()))


class Recent:
    """Arrays by key, of at most `capacity` bytes together: least recently kept out first."""

    def __init__(self, capacity: int):
        self._capacity, self._bytes = capacity, 0
        self._arrays: OrderedDict[str, np.ndarray] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __getitem__(self, key: str) -> np.ndarray:
        return self._arrays[key]

    def keep(self, found: Mapping[str, np.ndarray]) -> None:
        """Take these in, or count them as used, in their order."""
        for key, value in found.items():
            self.drop(key)
            self._arrays[key] = value
            self._bytes += value.nbytes
        while self._bytes > self._capacity:
            self._bytes -= self._arrays.popitem(last=False)[1].nbytes

    def drop(self, key: str) -> None:
        """Forget this one, if it is here."""
        if key in self._arrays:
            self._bytes -= self._arrays.pop(key).nbytes


class FeatureStore:
    """Soft tokens by image key, least recently used out first.

    `encoded` counts images that went through the tower in this process: on a steady working set it equals, over all
    processes, the number of distinct images (of those that no two met alone), whatever the number of prompts, completions and passes.
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
        peers: Peers = ALONE,
    ):
        """`capacity_bytes` of host memory are held at most, in a run of several processes half of them for what all
        hold; `chunk` images of like size go through the tower at once.

        `announce` is told, in order, of images that `pictures` will be asked for (`data.prefetch.PrefetchReader`).
        With a `mesh`, on which `params` live, its devices share the images of a chunk out among them. `peers` are those
        of `share`.
        """
        self._model = model.without_lora()
        self._params, self._mesh = params, mesh
        # Whole on every device of this process, since its host keeps them.
        whole = {} if mesh is None else {"out_shardings": replicated(mesh)}
        self._program = jax.jit(self._model.encode, **whole)
        self._pictures, self._announce = pictures, announce
        self._chunk = round_up(chunk, row_shares(mesh))
        self._peers, alone = peers, peers.count == 1
        self._held = Recent(capacity_bytes if alone else capacity_bytes // 2)
        #: what all processes hold. It changes in `share` alone, so that all know of it without a word
        self._common = Recent(0 if alone else capacity_bytes // 2)
        self.encoded = 0

    def reading(self, pictures: Pictures, *, capacity_bytes: int = 16 * GIB) -> FeatureStore:
        """The same tower, and its compiled programs, over other pictures; of what is encoded nothing is shared."""
        other = copy(self)
        other._pictures, other._announce, other.encoded = pictures, None, 0
        alone = self._peers.count == 1
        other._held = Recent(capacity_bytes if alone else capacity_bytes // 2)
        other._common = Recent(0 if alone else capacity_bytes // 2)
        return other

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
            self._announce([key for key in keys if key not in self._held and key not in self._common])

    def expect_share(self, keys: Sequence[str]) -> None:
        """As `expect`, of images that all processes will `share`: those that this one will have to read."""
        self.expect([key for key in keys if self._owner(key) == self._peers.index])

    def features(self, keys: Sequence[str]) -> list[Float[np.ndarray, "tokens embed"]]:
        """Features of these images in this order; those not held are read and encoded, `chunk` at a time."""
        distinct = dict.fromkeys(keys)
        found = {key: self._common[key] for key in distinct if key in self._common}
        found |= self._own([key for key in distinct if key not in found])
        return [found[key] for key in keys]

    def share(self, keys: Sequence[str], readers: Mapping[str, int] = {}) -> None:
        """Have all processes, which must call this at once with the same keys, hold the features of these images.

        What one of them holds is not encoded again; of the rest each encodes its part: those that `readers` says it
        reads ahead, and of others its part by their names. Nothing is said when all hold
        all already, and nothing is done in a run of one process.
        """
        if self._peers.count == 1:
            return
        distinct = list(dict.fromkeys(keys))
        missing = [key for key in distinct if key not in self._common]
        if missing:
            holders = self._peers.gather_from(lambda: [[key in self._held for key in missing]])
            owners = [
                next((process for process, holds in enumerate(holders) if holds[i]), readers.get(key, self._owner(key)))
                for i, key in enumerate(missing)
            ]
            mine = [key for key, owner in zip(missing, owners, strict=True) if owner == self._peers.index]
            found = dict(self._peers.gather_from(lambda: list(self._own(mine).items())))
        for key in missing:
            self._held.drop(key)
        self._common.keep({key: self._common[key] if key in self._common else found[key] for key in distinct})

    def _owner(self, key: str) -> int:
        """The process that encodes an image for all, unless another holds it: known long before, so that it reads ahead."""
        return zlib.crc32(key.encode()) % self._peers.count

    def _own(self, keys: list[str]) -> dict[str, np.ndarray]:
        """Of what this process holds by itself, or encodes now."""
        missing = [key for key in keys if key not in self._held]
        encoded = self._encode_missing(missing)
        self.encoded += len(missing)
        found = {key: encoded[key] if key in encoded else self._held[key] for key in keys}
        self._held.keep(found)
        return found

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
