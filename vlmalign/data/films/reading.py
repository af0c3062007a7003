"""What reads films for a tower: the contract that the rest of the toolkit knows, and the two steps that make it fast.

The first step, a film's file to a small uint8 film, takes a tenth of a second: it is cached, and may run in a worker
process. The second, that to the tower's float32 numbers, takes milliseconds.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np

from vlmalign.data.films.resize import Recipe
from vlmalign.data.films.resize_cache import ResizeCache
from vlmalign.types import Grid, Patches


@runtime_checkable
class PixelReader(Protocol):
    """The image side of a checkpoint folder; a key is the path of a JPEG or PNG file."""

    def grid(self, key: str) -> Grid:
        """How the image's soft tokens lie. Nothing is decoded: at most the file's header is read, once."""
        ...

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        """Pixels of each image: [channel, height, width] float32 for a tower of fixed size, else `Patches`."""
        ...


@runtime_checkable
class TwoStepReader(PixelReader, Protocol):
    """A reader whose slow step can be done elsewhere: `finish(load_film(key, recipe(key), cache))` is `read([key])`."""

    @property
    def cache(self) -> ResizeCache | None: ...

    def recipe(self, key: str) -> Recipe:
        """What the film is resized to. May be called from any thread."""
        ...

    def finish(self, film: np.ndarray) -> np.ndarray | Patches:
        """The pixels of a resized film. May be called from any thread."""
        ...
