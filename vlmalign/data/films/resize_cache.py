"""Resized films on disk, so that a film is decoded once and not once per run: bounded, checked, never in the way.

An entry is the resized film as it is, 8 bits a channel, and one channel where the film is grey (0.8 MB at 896 x 896,
where the tower's float32 would be 9.6). It carries its key and a checksum: one that is damaged is made anew. A folder that
cannot be read or written (no permission, disk full) costs time, not the run: it is said once, counted, and films are
resized as if there were no cache.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vlmalign.data.films.bounded_folder import BoundedFolder

_MAGIC = b"vlmfilm1"
#: magic, key, height, width, channels; the CRC-32 of all that and of the pixels stands behind them
_HEADER = struct.Struct("<8s32sIII")
_CHECKSUM = struct.Struct("<I")


@dataclass
class CacheCounts:
    """What a cache met, since it was opened."""

    hits: int = 0
    misses: int = 0
    stored: int = 0
    removed: int = 0  #: older entries, to make room
    corrupt: int = 0  #: entries that were damaged and are made anew; each is a miss as well
    failed: int = 0  #: reads and writes that the file system refused

    def __add__(self, other: CacheCounts) -> CacheCounts:
        return CacheCounts(**{name: value + getattr(other, name) for name, value in asdict(self).items()})


class ResizeCache:
    """Resized films by key (`resize.entry_key`). No method raises for what is wrong with the folder.

    Every process opens its own on the same folder; `limit` holds for all of them together.
    """

    def __init__(self, folder: Path, *, limit: int):
        """`limit` in bytes."""
        self._files = BoundedFolder(folder, limit=limit)
        self._warned = False
        self.counts = CacheCounts()

    @property
    def folder(self) -> Path:
        return self._files.folder

    @property
    def limit(self) -> int:
        """In bytes."""
        return self._files.limit

    def get(self, key: bytes) -> np.ndarray | None:
        """The film stored under `key`, uint8 [height, width] or [height, width, 3]; None when it must be made."""
        try:
            content = self._files.read(key.hex())
        except OSError as error:
            self._refused(error)
            content = None
        film = None
        if content is not None:
            film = _unpack(key, content)
            self.counts.corrupt += film is None
        self.counts.hits += film is not None
        self.counts.misses += film is None
        return film

    def put(self, key: bytes, film: np.ndarray) -> None:
        """Store a film, over a damaged one of the same key."""
        try:
            removed = self._files.write(key.hex(), _pack(key, film))
        except OSError as error:
            self._refused(error)
            return
        if removed is not None:  # else it is larger than the whole cache
            self.counts.stored += 1
            self.counts.removed += removed

    def _refused(self, error: OSError) -> None:
        self.counts.failed += 1
        if not self._warned:
            self._warned = True
            warnings.warn(
                # Without the entry's name: several workers that meet the same trouble say the same.
                f"the cache of resized films in {self.folder} cannot be used ({error.strerror}); films are resized each time "
                "they are read, until that is put right",
                RuntimeWarning,
                stacklevel=3,
            )


def _pack(key: bytes, film: np.ndarray) -> list[bytes | memoryview]:
    assert film.dtype == np.uint8
    assert film.ndim == 2 or film.shape[2:] == (3,)
    pixels = np.ascontiguousarray(film).reshape(-1).data
    header = _HEADER.pack(_MAGIC, key, *film.shape[:2], 1 if film.ndim == 2 else 3)
    return [header, pixels, _CHECKSUM.pack(zlib.crc32(pixels, zlib.crc32(header)))]


def _unpack(key: bytes, content: bytes) -> np.ndarray | None:
    """The film in an entry, read-only; None when the entry is not what was written under this key."""
    if len(content) < _HEADER.size + _CHECKSUM.size:
        return None
    body = memoryview(content)[: -_CHECKSUM.size]
    magic, found, height, width, channels = _HEADER.unpack(body[: _HEADER.size])
    (checksum,) = _CHECKSUM.unpack(content[-_CHECKSUM.size :])
    pixels = body[_HEADER.size :]
    whole = magic == _MAGIC and found == key and len(pixels) == height * width * channels
    if not whole or zlib.crc32(body) != checksum:
        return None
    return np.frombuffer(pixels, np.uint8).reshape((height, width) if channels == 1 else (height, width, channels))
