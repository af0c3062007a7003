"""Images in rows: paths under a root, or bytes inside a table, which become files in a folder of the run.

Bytes are written as they are, under their SHA-256, whole or not at all: a film that stands in several rows is one file,
and several processes may write it. They are decoded where all films are (`films.images`), with the same checks.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmalign.data.films.files import MAX_BYTES, BadImage
from vlmalign.data.sources.tables import inside
from vlmalign.quoting import MOST_OF_LINE, shown


class StoredImages:
    """Where the images of a file of rows are."""

    def __init__(self, root: Path, cache: Path):
        """`root`: paths start there and may not leave it; `cache`: folder for images that are bytes."""
        self.root, self.cache = root, cache

    def check(self, image: Any) -> str:
        """The path that `locate` will give, with nothing written; raises as it does."""
        data = _bytes_of(image)
        return str(self._place(data)) if data is not None else self._located(_path_of(image))

    def locate(self, image: Any) -> str:
        """The absolute path of an image: a path as text, or {"bytes", "path"} as `datasets` stores it.

        Raises:
            BadImage: for neither of them, and a path that leaves the root.
            FileNotFoundError: for a path where there is no file.
        """
        data = _bytes_of(image)
        if data is None:
            return self._located(_path_of(image))
        place = self._place(data)
        if not place.exists():
            # Patients' images: for the user alone, as the run folder's other rows are not meant for others.
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")
            partial.write_bytes(data)
            os.replace(partial, place)
        return str(place)

    def _place(self, data: bytes) -> Path:
        name = hashlib.sha256(data).hexdigest()
        return self.cache.absolute() / name[:2] / name

    def _located(self, path: str) -> str:
        try:
            found = inside(self.root, path)
            there = found.is_file()
        except (ValueError, OSError) as error:
            raise BadImage(str(error)) from error
        if not there:
            raise FileNotFoundError(f"no image {shown(found, MOST_OF_LINE)}")
        return str(found)


def _bytes_of(image: Any) -> bytes | None:
    data = image.get("bytes") if isinstance(image, Mapping) else image
    if not isinstance(data, bytes):
        return None
    if not 0 < len(data) <= MAX_BYTES:
        raise BadImage(f"an image of {len(data)} bytes inside the table; this is no film")
    return data


def _path_of(image: Any) -> str:
    path = image.get("path") if isinstance(image, Mapping) else image
    if not isinstance(path, str):
        raise BadImage(f"an image must be a path or stored bytes, found {type(image).__name__}")
    return path
