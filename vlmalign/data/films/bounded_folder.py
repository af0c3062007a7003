"""Files under a limit in bytes, least recently used out first, that several processes may read and write at once.

A file appears whole or not at all (written beside, then renamed). Reading takes no lock; writing takes one for the
moment of the renaming, and while old files are removed. The sum of all sizes stands in a small file that is also the
lock; it is put up before a file appears, so a killed process leaves it too high, never too low, and the next removal
counts anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

USAGE = "usage"
PARTIAL = "partial"
#: After a removal this share of the limit is in use: a scan of the whole folder then serves many writes.
KEPT = 0.9
#: seconds after which a file that was never finished is taken for a killed process's
ABANDONED_S = 3600.0


class _Entry(NamedTuple):
    used: int  #: nanoseconds since the epoch
    size: int
    path: Path


class BoundedFolder:
    """At most `limit` bytes of files in `folder`, beside one file in the making per process.

    Every method may raise OSError: no permission, no space, a folder that is a file.
    """

    def __init__(self, folder: Path, *, limit: int):
        if limit < 1:
            raise ValueError(f"the limit of a folder must be at least 1 byte, found {limit}")
        self.folder, self.limit = folder, limit

    def read(self, name: str) -> bytes | None:
        """The content of a file, which now counts as just used; None when there is none of this name."""
        path = self._path(name)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        # Removed by somebody else just now, or a folder we may only read: what was read is good, only its age is not.
        with contextlib.suppress(OSError):
            os.utime(path)
        return content

    def write(self, name: str, parts: Sequence[bytes | memoryview]) -> int | None:
        """Store a file, over an older one of its name; returns how many others were removed to make room.

        None when it is larger than the limit: then nothing is stored.
        """
        size = sum(len(part) for part in parts)
        if size > self.limit:
            return None
        final = self._path(name)
        partial = self.folder / PARTIAL / f"{name}.{uuid.uuid4().hex}"
        partial.parent.mkdir(parents=True, exist_ok=True)
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "xb") as file:
                for part in parts:
                    file.write(part)
            with self._locked() as usage:
                return self._publish(partial, final, size, usage)
        except BaseException:
            with contextlib.suppress(OSError):  # the first error is the one to tell
                partial.unlink()
            raise

    def _publish(self, partial: Path, final: Path, size: int, usage: int) -> int:
        known = _read_sum(usage)
        old = final.stat().st_size if final.exists() else 0
        removed = 0
        if known is None or known - old + size > self.limit:
            known, removed = self._make_room(size - old, keep=final)
        _write_sum(usage, known - old + size)
        os.replace(partial, final)
        return removed

    def _make_room(self, more: int, *, keep: Path) -> tuple[int, int]:
        """(bytes in use, files removed) once `more` bytes fit; the file at `keep` is about to be replaced."""
        entries = sorted(self._entries())
        total, removed = sum(entry.size for entry in entries), 0
        target = self.limit if total + more <= self.limit else int(KEPT * self.limit)
        for entry in entries:
            if total + more <= target:
                break
            if entry.path != keep:
                entry.path.unlink(missing_ok=True)
                total, removed = total - entry.size, removed + 1
        self._drop_abandoned()
        return total, removed

    def _entries(self) -> Iterator[_Entry]:
        for shelf in os.scandir(self.folder):
            if shelf.is_dir() and shelf.name != PARTIAL:
                for file in os.scandir(shelf.path):
                    with contextlib.suppress(FileNotFoundError):  # removed by hand at this moment
                        found = file.stat()
                        yield _Entry(found.st_mtime_ns, found.st_size, Path(file.path))

    def _drop_abandoned(self) -> None:
        for file in os.scandir(self.folder / PARTIAL):
            with contextlib.suppress(FileNotFoundError):  # finished at this moment
                if time.time() - file.stat().st_mtime > ABANDONED_S:
                    os.unlink(file.path)

    def _path(self, name: str) -> Path:
        # 256 shelves: a folder of half a million files is slow on many file systems.
        return self.folder / name[:2] / name

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        """The descriptor of the sum's file, which no other process holds meanwhile."""
        descriptor = os.open(self.folder / USAGE, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # gives the lock back, as the end of a killed process does


def _read_sum(descriptor: int) -> int | None:
    """The sum of all sizes; None when none was ever written, or not whole."""
    found = os.pread(descriptor, 64, 0)
    return int(found) if re.fullmatch(rb"\d{20}\n", found) else None


def _write_sum(descriptor: int, total: int) -> None:
    os.pwrite(descriptor, b"%020d\n" % total, 0)
