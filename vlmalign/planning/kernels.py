"""Machine code kept between programs that are compiled for a GPU: a kernel that several of them hold is made once.

Much of what a small program costs is NVIDIA's assembler, which is started anew for every kernel. XLA can keep its results
in a file. It reads that file whole and appends to it, with no lock, so that each file serves one compilation at a time.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: the compiler's option that names the file
KEPT_IN = "xla_gpu_kernel_cache_file"


class KernelFiles:
    """Files that are there as long as this object; as many as compilations ran at the same time."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="vlmalign_kernels_"))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._lock = threading.Lock()
        self._made = 0
        self._free: list[Path] = []

    @contextmanager
    def borrowed(self) -> Iterator[Path]:
        """A file for one compilation, of which the first of them has yet to make it."""
        with self._lock:
            if self._free:
                file = self._free.pop()
            else:
                file = self._folder / str(self._made)
                self._made += 1
        try:
            yield file
        finally:
            with self._lock:
                self._free.append(file)
