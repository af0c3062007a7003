"""What rewards print in their workers: kept up to a bound, never on the terminal of the run."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import BinaryIO

#: bytes that are kept of all that rewards print; the rest is counted
MOST = 2**20


class BoundedOutput:
    """A pipe for the output of worker processes: its first `MOST` bytes go to `path`, made when there are any, or to
    stderr, and what is beyond them is read and dropped."""

    def __init__(self, path: Path | None):
        self._path, self._most = path, MOST if path is not None else MOST // 16
        reading, self.writing = os.pipe()
        self._thread = threading.Thread(target=self._read, args=(reading,), name="reward output", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Called once the workers have ended: what they printed is kept by the time that this returns."""
        os.close(self.writing)
        self._thread.join(5.0)  # a child that got away still holds the pipe; it is read until this process ends

    def _read(self, reading: int) -> None:
        kept = dropped = 0
        target: BinaryIO | None = None
        with open(reading, "rb", buffering=0) as pipe:
            while data := pipe.read(2**16):
                part = data[: self._most - kept]
                dropped += len(data) - len(part)
                if part:
                    if target is None:
                        target = sys.stderr.buffer if self._path is None else self._path.open("ab")
                    target.write(part)
                    target.flush()
                    kept += len(part)
        if dropped and target is not None:
            target.write(f"\n[{dropped} more bytes were printed by rewards, and left out]\n".encode())
            target.flush()
        if self._path is not None and target is not None:
            target.close()
