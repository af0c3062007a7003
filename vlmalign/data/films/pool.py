"""Worker processes that read films, and the threads that wait for them and make pixels of what they send.

A worker is a fresh interpreter, never a fork (JAX's threads hold locks that a fork would copy), and does not import the
main script again, as multiprocessing's spawn would. It ends when its pipe closes, so it does not outlive a main process
that was killed. One that dies is replaced, and its film tried once more: it may have died of another's memory.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import warnings
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from multiprocessing.connection import Pipe
from typing import NamedTuple

import numpy as np

from vlmalign.data.films.files import BadImage
from vlmalign.data.films.reading import TwoStepReader
from vlmalign.data.films.resize_cache import CacheCounts, ResizeCache
from vlmalign.data.films.worker import Reply, Start, Task
from vlmalign.types import Patches

_BOOT = "import sys; sys.path[:] = {path!r}; from vlmalign.data.films.worker import serve; serve({descriptor})"


class _Request(NamedTuple):
    path: str
    future: Future[np.ndarray | Patches]


@dataclass
class PoolCounts:
    """What the workers did, those that died included."""

    work_s: float = 0.0  #: seconds of reading, summed over the workers
    restarts: int = 0  #: workers that died and were replaced
    gone: CacheCounts = field(default_factory=CacheCounts)  #: of the caches of workers that died


class FilmPool:
    """`workers` processes, started at once."""

    def __init__(self, reader: TwoStepReader, *, workers: int):
        self._reader = reader
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._lock = threading.RLock()  # reentrant: the garbage collector may close a pool from inside it
        self._closed = False
        self._said: set[str] = set()
        self._counts = PoolCounts()
        self._workers = [_Worker(reader.cache) for _ in range(workers)]
        # Threads and not one loop over the pipes: a worker that waits for the main process to take a film is idle.
        # Daemons: the interpreter must not wait for them to finish films that nobody wants any more.
        self._threads = [
            threading.Thread(target=self._serve, args=(i,), daemon=True, name=f"film reader {i}")
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, path: str) -> Future[np.ndarray | Patches]:
        """The pixels of a film, or what `read` of the reader would raise; RuntimeError when workers cannot read it."""
        future: Future[np.ndarray | Patches] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("films were asked for after their reader was closed")
            self._requests.put(_Request(path, future))
        return future

    def counts(self) -> tuple[PoolCounts, CacheCounts]:
        """What was done so far, and what the caches of all workers met."""
        with self._lock:
            caches = sum((worker.counts for worker in self._workers), self._counts.gone)
            return PoolCounts(self._counts.work_s, self._counts.restarts), caches

    def close(self) -> None:
        """End processes and threads at once. Films that were asked for and not read are cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    request = self._requests.get_nowait()
                    assert request is not None
                    request.future.cancel()
            for worker in self._workers:
                self._requests.put(None)
                worker.kill()  # its thread reads the end of the pipe
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    def _serve(self, index: int) -> None:
        while (request := self._requests.get()) is not None:
            if request.future.set_running_or_notify_cancel():
                try:
                    request.future.set_result(self._read(index, request.path))
                except BaseException as error:  # for the thread that asked, whatever it is
                    request.future.set_exception(error)
            del request  # the pixels are the asking thread's alone from here
        self._workers[index].close()

    def _read(self, index: int, path: str) -> np.ndarray | Patches:
        task = Task(path, self._reader.recipe(path))
        deaths: list[str] = []
        while len(deaths) < 2:
            worker = self._workers[index]
            try:
                reply, film = worker.ask(task)
            except (EOFError, OSError):
                self._replace(index)
                deaths.append(worker.death())
                continue
            self._note(worker, reply)
            if film is not None:
                return self._reader.finish(film)
            if reply.kind == "missing":
                raise FileNotFoundError(reply.text)
            if reply.kind == "bad":
                raise BadImage(reply.text)
            raise RuntimeError(f"{path}: reading it failed in a worker process:\n{reply.text}")
        raise RuntimeError(
            f"{path}: the worker process that read it {deaths[0]}, and the next one that tried {deaths[1]}; "
            "look for memory limits, and whether the film opens elsewhere"
        )

    def _replace(self, index: int) -> None:
        with self._lock:
            if self._closed:
                raise CancelledError
            gone = self._workers[index]
            gone.kill()
            gone.close()
            self._counts.gone += gone.counts
            self._counts.restarts += 1
            self._workers[index] = _Worker(self._reader.cache)

    def _note(self, worker: _Worker, reply: Reply) -> None:
        with self._lock:
            self._counts.work_s += reply.seconds
            worker.counts = reply.counts
            fresh = [text for text in reply.warnings if text not in self._said]  # once, and not once per worker
            self._said.update(fresh)
        for text in fresh:
            warnings.warn(text, RuntimeWarning, stacklevel=2)


class _Worker:
    """One process and our end of its pipe."""

    def __init__(self, cache: ResizeCache | None):
        self._start: Start | None = Start(None, 0) if cache is None else Start(cache.folder, cache.limit)
        self.counts = CacheCounts()
        self._connection, theirs = Pipe()
        boot = _BOOT.format(path=[entry or os.getcwd() for entry in sys.path], descriptor=theirs.fileno())
        self._process = subprocess.Popen(
            [sys.executable, "-c", boot],
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # Ctrl-C is the main process's affair
        )
        theirs.close()

    def ask(self, task: Task) -> tuple[Reply, np.ndarray | None]:
        """Raises EOFError or OSError when the process is gone."""
        if self._start is not None:
            self._connection.send(self._start)
            self._start = None
        self._connection.send(task)
        reply: Reply = self._connection.recv()
        if reply.kind != "film":
            return reply, None
        film = np.empty(reply.shape, np.uint8)
        self._connection.recv_bytes_into(film.reshape(-1).data)
        return reply, film

    def death(self) -> str:
        """How the process ended, in words."""
        code = self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")

    def kill(self) -> None:
        """End the process; may be called while another thread waits in `ask`, which then raises."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Only by the thread that asks: a closed descriptor's number may be another file's at once."""
        self._connection.close()
