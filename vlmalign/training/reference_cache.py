"""Reference log-probabilities on disk, computed once for all runs that may share them and never taken by others.

A record is found by two keys, both hashes of content. The scorer's: every parameter's value, the model's configuration,
temperature, dtype, attention and what else changes a number. The group's: its tokens and the pixels of its images, not
its id, its loss weights or how it was batched. So a cache cannot be stale: what has changed is not found, and is
computed again by itself.

    <folder>/<scorer's key>/scorer.json             what the key was made of
    <folder>/<scorer's key>/<hash>.safetensors      records: group's key -> [K, C] float32, C the longest continuation

A file appears whole (written beside, flushed, renamed), so a killed run leaves all it had finished. Of the processes of a
run the first lists and writes the folder, and tells the others what is there: they might see it later than it does.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vlmalign.exchange import agree, fetch, from_first
from vlmalign.models.model import Model, Params
from vlmalign.models.towers import Picture
from vlmalign.shapes import Float
from vlmalign.types import Group, Patches

FORMAT = "1"  #: of files and keys; another number makes other keys


def scorer_identity(model: Model, params: Params, *, temperature: float) -> dict[str, Any]:
    """All that a token's log-probability depends on besides the token and what stands before it."""
    return {
        "format": FORMAT,
        "config": repr(model.config),
        "lora": repr(model.lora),
        "dtype": model.dtype,
        "attention": model.attention,
        "temperature": float(temperature),
        "backend": jax.default_backend(),
        "matmul_precision": str(jax.config.jax_default_matmul_precision),
        "parameters": params_digest(params),
    }


def params_digest(params: Params) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all parameters (a second or two for each GB), wherever they live.

    Where they are spread over processes, all of these must ask at once.
    """
    items = sorted(params.items())
    # Hashing releases the interpreter's lock; a few at a time, so that few copies are on the host at once. Processes
    # must gather what is spread over them in one order.
    together = all(not isinstance(v, jax.Array) or v.is_fully_addressable for v in params.values())
    with ThreadPoolExecutor(max_workers=4 if together else 1) as pool:
        digests = list(pool.map(lambda item: array_digest(fetch(item[1])), items))
    return _digest(f"{name} {digest}".encode() for (name, _), digest in zip(items, digests, strict=True))


def array_digest(value: np.ndarray) -> str:
    """SHA-256 of dtype, shape and bytes."""
    head = f"{value.dtype.name} {value.shape}".encode()
    return _digest([head, np.ascontiguousarray(value).reshape(-1).view(np.uint8).data])


def picture_digest(picture: Picture) -> str:
    """SHA-256 of an image as its processor prepared it: one pixel, or one setting of the processor, makes another."""
    if isinstance(picture, Patches):
        return _digest([f"{picture.rows} {picture.columns} {array_digest(picture.values)}".encode()])
    return array_digest(picture)


def group_digest(group: Group, image_digest: Callable[[str], str]) -> str:
    """SHA-256 of all tokens and of what stands at image tokens; `image_digest(key)` is that of an image's content."""
    pieces = [group.prompt, *group.continuations]
    numbers = [array for piece in pieces for array in (piece.tokens, piece.image)]
    return _digest([key.encode() for key in (*map(array_digest, numbers), *map(image_digest, group.images))])


def _digest(parts: Iterable[bytes | memoryview]) -> str:
    """SHA-256 of parts with their lengths: no two lists of parts run together into the same bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


class ReferenceCache:
    """The records of one scorer; all processes of a run open, ask and fill it together."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        """Opens or makes `<folder>/<key>`.

        Raises:
            ValueError: naming a file that is damaged, or that was made by another scorer and put here; and when the
                processes of the run have different scorers.
        """
        text = json.dumps(dict(identity), sort_keys=True, indent=1)
        self.key = _digest([text.encode()])
        agree(self.key, "the reference's parameters and settings")
        self.folder = Path(folder) / self.key
        #: group's key -> name of its file
        self._file_of: dict[str, str] = from_first(lambda: self._open(text))

    def __contains__(self, group: str) -> bool:
        return group in self._file_of

    def __len__(self) -> int:
        return len(self._file_of)

    def get(self, group: str) -> Float[np.ndarray, "k c"]:
        """The record of a group's key; KeyError when there is none."""
        with safe_open(self.folder / self._file_of[group], framework="numpy") as file:
            return file.get_tensor(group)

    def fill(self, records: Mapping[str, Float[np.ndarray, "k c"]]) -> None:
        """Adds records as one file: all of them are there afterwards, or none.

        Raises:
            ValueError: naming a record that is not finite float32; nothing is written then.
        """
        for name, value in records.items():
            if value.dtype != np.float32 or value.ndim != 2 or not np.isfinite(value).all():
                raise ValueError(
                    f"reference log-probabilities of group {name[:12]} must be finite float32 [K, C]; found "
                    f"{value.dtype} {value.shape}{'' if np.isfinite(value).all() else ' with NaN or infinity'}"
                )
        if not records:
            return
        file = f"{_digest(sorted(map(str.encode, records)))[:32]}.safetensors"
        tensors = {name: np.ascontiguousarray(value) for name, value in records.items()}
        metadata = {"format": FORMAT, "scorer": self.key}
        from_first(lambda: _write(self.folder / file, save(tensors, metadata=metadata)))
        self._file_of.update(dict.fromkeys(records, file))

    def _open(self, identity: str) -> dict[str, str]:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "scorer.json").exists():
            _write(self.folder / "scorer.json", identity.encode())
        paths = sorted(self.folder.glob("*.safetensors"))
        return {name: path.name for path in paths for name in self._names(path)}

    def _names(self, path: Path) -> list[str]:
        try:
            with safe_open(path, framework="numpy") as file:
                metadata, names = file.metadata() or {}, list(file.keys())
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and its part is computed again") from error
        if metadata.get("scorer") != self.key:
            raise ValueError(
                f"{path} holds log-probabilities of another scorer ({metadata.get('scorer', 'unnamed')[:12]}, "
                f"expected {self.key[:12]}); delete it, and its part is computed again"
            )
        return names


def _write(path: Path, content: bytes) -> None:
    """A whole file or none, on disk before it has its name."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
