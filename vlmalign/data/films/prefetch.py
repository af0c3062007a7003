"""Films read ahead of their use by worker processes, so that the device does not wait for JPEG.

`expect` tells which films will be asked for; they are read in that order, at most `ahead` of them waiting. `read` takes
them, in any order; a film that was not announced is read all the same. What is wrong with a film is raised by `read`.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import numpy as np

from vlmalign.data.films.pool import FilmPool
from vlmalign.data.films.reading import TwoStepReader
from vlmalign.data.films.resize_cache import CacheCounts
from vlmalign.types import Grid, Patches

Item = TypeVar("Item")

#: A film that was announced and is not taken while this many times `ahead` others were is no longer waited for.
PATIENCE = 4


class ReadStatistics(NamedTuple):
    """How reading kept up, since the first `read`."""

    films: int
    waited_s: float  #: seconds in which `read` had to wait
    elapsed_s: float  #: seconds from the first call of `read` to now
    work_s: float  #: seconds that workers read, summed over them
    unused: int  #: films read ahead that nobody took
    restarts: int  #: workers that died
    cache: CacheCounts

    @property
    def waited_share(self) -> float:
        """Of the time since the first `read`: 0 when films were always ready."""
        return self.waited_s / self.elapsed_s if self.elapsed_s else 0.0

    def __str__(self) -> str:
        text = (
            f"{self.films} films, waited {self.waited_s:.1f} s of {self.elapsed_s:.1f} s for them "
            f"({100 * self.waited_share:.1f} %); cache: {self.cache.hits} found, {self.cache.misses} made"
        )
        for count, what in (
            (self.cache.corrupt, "entries damaged"),
            (self.cache.failed, "times the file system refused"),
            (self.restarts, "workers died"),
            (self.unused, "read in vain"),
        ):
            text += f", {count} {what}" if count else ""
        return text


class _Ahead(NamedTuple):
    future: Future[np.ndarray | Patches]
    films: int  #: taken when this one was begun


class PrefetchReader:
    """A `PixelReader` with the pixels of `reader`, read by `workers` processes; to be closed, or used in a `with`.

    At most `ahead` + 1 films are held that were not taken yet: at 896 x 896 pixels 9.6 MB each, as patches of
    Qwen2.5-VL up to 24. `ahead` should be no less than the films of a batch, which are not taken in the order in which
    they were announced. All methods may be called from several threads.
    """

    def __init__(self, reader: TwoStepReader, *, workers: int, ahead: int):
        for name, value in (("workers", workers), ("ahead", ahead)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}; read without workers instead")
        self._reader, self._limit = reader, ahead
        self._lock = threading.RLock()
        self._announced: OrderedDict[str, None] = OrderedDict()
        self._begun: OrderedDict[str, _Ahead] = OrderedDict()
        self._films = self._unused = 0
        self._waited = 0.0
        self._first: float | None = None
        self._pool = FilmPool(reader, workers=workers)
        # Runs when this is collected and at the end of the interpreter, whatever ended it.
        self._close = weakref.finalize(self, self._pool.close)

    def grid(self, key: str) -> Grid:
        return self._reader.grid(key)

    def expect(self, keys: Iterable[str]) -> None:
        """These films will be asked for next, in this order, after those announced before."""
        with self._lock:
            for key in keys:
                if key not in self._begun:
                    self._announced.setdefault(key)
            self._fill()

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        with self._lock:
            if self._first is None:
                self._first = time.perf_counter()
            for key in reversed(keys):  # before all that was announced for later
                if key not in self._begun:
                    self._announced[key] = None
                    self._announced.move_to_end(key, last=False)
            self._fill()
        return [self._take(key) for key in keys]

    def statistics(self) -> ReadStatistics:
        """So far."""
        pool, cache = self._pool.counts()
        with self._lock:
            elapsed = 0.0 if self._first is None else time.perf_counter() - self._first
            return ReadStatistics(self._films, self._waited, elapsed, pool.work_s, self._unused, pool.restarts, cache)

    def close(self) -> None:
        """End the workers; films that were read ahead are given up."""
        self._close()

    def __enter__(self) -> PrefetchReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        self.close()

    def _take(self, key: str) -> np.ndarray | Patches:
        with self._lock:
            if key in self._begun:
                future = self._begun.pop(key).future
            else:
                self._announced.pop(key, None)
                future = self._pool.submit(key)
            self._films += 1
            self._fill()
        began = time.perf_counter()
        try:
            return future.result()
        finally:
            with self._lock:
                self._waited += time.perf_counter() - began

    def _fill(self) -> None:
        """Begin what may be begun."""
        while self._begun:
            key, oldest = next(iter(self._begun.items()))
            if self._films - oldest.films <= PATIENCE * self._limit:
                break
            oldest.future.cancel()
            del self._begun[key]
            self._unused += 1
        while self._announced and len(self._begun) < self._limit:
            key, _ = self._announced.popitem(last=False)
            self._begun[key] = _Ahead(self._pool.submit(key), self._films)


class Announced(Sequence[Item]):
    """Items whose films are announced when the item is taken: a pipeline that takes items early has films read early.

    `films` gives the keys of an item's films, `expect` hears of them (`PrefetchReader.expect`).
    """

    def __init__(
        self, items: Sequence[Item], *, films: Callable[[Item], Sequence[str]], expect: Callable[[Sequence[str]], None]
    ):
        self._items, self._films, self._expect = items, films, expect

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        self._expect(self._films(item))
        return item
