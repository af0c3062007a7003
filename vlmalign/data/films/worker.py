"""The worker process that reads films: file to small film, one a message, until its pipe closes.

It is started as a fresh interpreter (see `pool`) and imports NumPy and Pillow only: it is ready in a fraction of a
second and takes some 50 MB. What it sends is uint8, a twelfth of the tower's float32 for a grey film.
"""

from __future__ import annotations

import time
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vlmalign.data.films.files import BadImage
from vlmalign.data.films.resize import Recipe, load_film
from vlmalign.data.films.resize_cache import CacheCounts, ResizeCache


class Start(NamedTuple):
    """Main process -> worker, first: the cache to use."""

    folder: Path | None
    limit: int  #: bytes


class Task(NamedTuple):
    """Main process -> worker: read this."""

    path: str
    recipe: Recipe


class Reply(NamedTuple):
    """Worker -> main process; with a film, its bytes follow as the next message."""

    kind: str  #: "film", "missing" (FileNotFoundError), "bad" (BadImage) or "failed" (anything else)
    shape: tuple[int, ...]
    text: str  #: of the error
    seconds: float
    counts: CacheCounts  #: of this worker's cache, since it was started
    warnings: tuple[str, ...]


def serve(descriptor: int) -> None:
    """Answer until the other end closes, as it does when the main process is killed."""
    connection = Connection(descriptor)
    try:
        folder, limit = connection.recv()
        cache = None if folder is None else ResizeCache(folder, limit=limit)
        while True:
            reply, film = _answer(connection.recv(), cache)
            connection.send(reply)
            if film is not None:
                connection.send_bytes(np.ascontiguousarray(film).reshape(-1).data)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


def _answer(task: Task, cache: ResizeCache | None) -> tuple[Reply, np.ndarray | None]:
    film, kind, text = None, "film", ""
    began = time.perf_counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            film = load_film(task.path, task.recipe, cache)
        except FileNotFoundError as error:
            kind, text = "missing", str(error)
        except BadImage as error:
            kind, text = "bad", str(error)
        except Exception:  # whatever it is, the main process raises it where the film is used
            kind, text = "failed", traceback.format_exc()
    reply = Reply(
        kind,
        () if film is None else film.shape,
        text,
        time.perf_counter() - began,
        CacheCounts() if cache is None else cache.counts,
        tuple(str(warning.message) for warning in said),
    )
    return reply, film
