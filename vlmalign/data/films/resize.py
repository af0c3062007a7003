"""A film's file -> the same film at the size a tower takes it: uint8, a function of the bytes and a `Recipe` alone.

This is the slow part of reading a film (decoding and resizing), so it is what is cached (`resize_cache`) and what worker
processes do (`prefetch`). What follows, grey levels to the tower's numbers, takes a few milliseconds (`levels`).
"""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, features

from vlmalign.data.films.dicom import decoder_versions, is_dicom
from vlmalign.data.films.files import read_film
from vlmalign.data.films.images import decode_image
from vlmalign.data.films.resize_cache import ResizeCache

#: Counts up when the pixels that `resize_film` makes of the same bytes change: older cache entries are then not found.
RULES = 2


class Recipe(NamedTuple):
    """What becomes of a film."""

    height: int  #: in pixels, after resizing
    width: int
    resample: int  #: one of Pillow's filters
    reduce: (
        bool  #: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, where that is still no smaller than the result
    )
    source: tuple[int, int] | None = None  #: (height, width) that the file's header said before: another is refused
    bits: int = 16  #: that 16-bit grey uses, from the lowest


def resize_film(data: bytes, name: str, recipe: Recipe) -> np.ndarray:
    """The film in a file's bytes, uint8 [height, width] where it is grey, else [height, width, 3].

    Resized grey equals every channel of the same film resized as RGB.

    Raises:
        BadImage: naming the film, see `images.load_image`.
    """
    size = (recipe.height, recipe.width)
    film = decode_image(data, name, size if recipe.reduce else None, size=recipe.source, bits=recipe.bits)
    small = np.asarray(film.resize(size[::-1], resample=recipe.resample))
    if small.ndim == 3 and (small[..., 0] == small[..., 1]).all() and (small[..., 0] == small[..., 2]).all():
        return np.ascontiguousarray(small[..., 0])
    return small


def entry_key(data: bytes, recipe: Recipe) -> bytes:
    """32 bytes that differ whenever `resize_film` might give other pixels.

    By the film's content and not by its path, size and date: a film that was replaced is never taken for the old one,
    and a data set that was moved or copied is still known. (SHA-256 of 2.3 MB took 1.3 ms, decoding it 90.)
    """
    versions = (*_decoder(), *(decoder_versions() if is_dicom(data) else ()))
    asked = repr((RULES, recipe._replace(source=None), *versions))
    return hashlib.sha256(hashlib.sha256(data).digest() + asked.encode()).digest()


@cache
def _decoder() -> tuple[str | None, ...]:
    """Versions whose change might change a pixel."""
    return (Image.__version__, features.version("jpg"), features.version("libjpeg_turbo"), platform.machine())


def load_film(path: str, recipe: Recipe, films: ResizeCache | None) -> np.ndarray:
    """The film at `path` by `recipe`, from the cache where it is there.

    Raises:
        FileNotFoundError, BadImage: naming the film, as without a cache: its file must be there and whole.
    """
    data = read_film(path)
    if films is None:
        return resize_film(data, path, recipe)
    key = entry_key(data, recipe)
    film = films.get(key)
    if film is None:
        film = resize_film(data, path, recipe)
        films.put(key, film)
    return film
