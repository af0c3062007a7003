"""Who is at work on an artefact: one process, known by a lock file in the run folder that it touches while it works.

A lock is made by a hard link, which is there for one of two processes that try at once, on file servers too; flock is
not. It says which process on which machine it belongs to. On the same machine a process that is gone is seen at once. Of
another machine nothing can be seen but the lock's age: one that nobody touched for two minutes, by the clock of the file
server itself, is taken over. Whoever was taken over (a machine that slept) finds another name in its lock before it
writes anything that others rely on, and stops.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

#: seconds between two touches of a lock, and after which one of another machine counts as left behind
TOUCH_SECONDS, SILENT_SECONDS = 10.0, 120.0

OWNERS = ".owners"


@dataclass(frozen=True)
class Owner:
    """What a lock file says."""

    host: str
    machine: str  #: its boot and process namespace: only there the process id says something
    pid: int
    started: str  #: the process's start, in the kernel's clock: process ids are used again
    token: str  #: of one start of a run

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Held:
    """A lock that is somebody else's."""

    owner: Owner
    silent: float  #: seconds since it was last touched, by the file server's clock
    here: bool  #: on this machine: it is known to be at work

    def __str__(self) -> str:
        return str(self.owner) if self.here else f"{self.owner}, last seen {self.silent:.0f} s ago"


class Lost(ValueError):
    """The artefact belongs to another process now."""


class Owners:
    """The locks of one start of a run, in `run/.owners`; process 0 of a run has them.

    Use as a context manager: what is held then is given up at its end, and a thread touches it until then.
    """

    def __init__(self, run: Path, *, take_over: bool = False):
        """`take_over`: locks of others count for nothing."""
        self._run, self._folder, self._take_over = run, run / OWNERS, take_over
        self._me = Owner(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()), secrets.token_hex(8))
        self._mine: set[str] = set()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Owners:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
        for name in tuple(self._mine):
            self.release(name)
        if self._thread is not None:
            self._tidy_up()

    def claim(self, name: str) -> Held | None:
        """Take the artefact `name`; returns who has it where it cannot be had."""
        if name in self._mine:
            return None
        lock = self._folder / name
        own = lock.with_name(f"{lock.name}.{self._me.token}")
        self._write(own)
        try:
            while not _linked(own, lock):
                held = self._held(lock, own)
                if held is not None and not self._counts_for_nothing(held):
                    return held
                if held is not None:
                    self._remove(lock, held.owner)
        finally:
            own.unlink(missing_ok=True)
        self._mine.add(name)
        if self._thread is None:
            self._thread = threading.Thread(target=self._touch, name="owner", daemon=True)
            self._thread.start()
        return None

    def holder(self, name: str) -> Held | None:
        """Who else is at work on an artefact; None for nobody, or for one that is gone."""
        lock = self._folder / name
        held = self._held(lock, None)
        mine = held is not None and held.owner.token == self._me.token
        return None if held is None or mine or self._counts_for_nothing(held) else held

    def check(self, name: str) -> None:
        """Raises `Lost` where `name` is no longer this process's. What is written after this is nobody else's."""
        lock = self._folder / name
        for attempt in range(5):
            owner = _read(lock)
            if owner is not None and owner.token == self._me.token:
                return
            if owner is None:
                time.sleep(0.05 * attempt)  # one that takes over puts back at once what it should not have taken
        taken = "its lock is gone" if owner is None else f"{owner} has taken it over"
        raise Lost(
            f"{self._run / name} is no longer this process's: {taken}. This start ends here and leaves it to the other; "
            f"`vlmalign status {self._run}` shows what is under way"
        )

    @contextmanager
    def holding(self, name: str) -> Iterator[None]:
        """Give `name` up afterwards."""
        try:
            yield
        finally:
            self.release(name)

    def release(self, name: str) -> None:
        self._mine.discard(name)
        lock = self._folder / name
        owner = _read(lock)
        if owner is not None and owner.token == self._me.token:
            lock.unlink(missing_ok=True)

    def _tidy_up(self) -> None:
        """Remove what is empty; others may be doing the same, or be about to write there (`_write`)."""
        with suppress(FileNotFoundError):
            for folder in (*sorted(self._folder.rglob("*"), reverse=True), self._folder):
                with suppress(OSError):  # a lock, or a folder that is not empty
                    folder.rmdir()

    def _write(self, own: Path) -> None:
        while True:
            own.parent.mkdir(parents=True, exist_ok=True)
            try:
                own.write_text(json.dumps(asdict(self._me)) + "\n", encoding="utf-8")
                return
            except FileNotFoundError:  # another start has just tidied up
                continue

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            for name in tuple(self._mine):
                lock = self._folder / name
                owner = _read(lock)
                if owner is not None and owner.token == self._me.token:
                    with suppress(OSError):  # a file server that is away for a moment; `check` is what decides
                        os.utime(lock)

    def _held(self, lock: Path, just_written: Path | None) -> Held | None:
        """The lock as it is; None where there is none any more. Its age is told by a file written just now, on the same
        file server, and for want of one by this machine's clock."""
        try:
            touched = lock.stat().st_mtime
        except FileNotFoundError:
            return None
        owner = _read(lock) or Owner("an unknown machine", "", 0, "", "")
        now = time.time() if just_written is None else just_written.stat().st_mtime
        silent = max(0.0, now - touched)
        return Held(owner, silent, owner.machine == self._me.machine)

    def _counts_for_nothing(self, held: Held) -> bool:
        """Whether its owner is gone, or was told to be."""
        if self._take_over:
            return True
        return _started(held.owner.pid) != held.owner.started if held.here else held.silent > SILENT_SECONDS

    def _remove(self, lock: Path, owner: Owner) -> None:
        """Take away the lock of one that is gone; a newer one that came in between is put back."""
        aside = lock.with_name(f"{lock.name}.{self._me.token}.old")
        try:
            lock.rename(aside)
        except FileNotFoundError:
            return
        found = _read(aside)
        if found is not None and found.token != owner.token:
            _linked(aside, lock)
        aside.unlink()


def _linked(own: Path, lock: Path) -> bool:
    """Whether `lock` is now `own`: made in one step, by a link or where there are none by an exclusive creation."""
    try:
        os.link(own, lock)
        return True
    except FileExistsError:
        # A file server whose answer was lost is asked again, and finds what it has made.
        return own.stat().st_nlink > 1 and lock.exists() and own.samefile(lock)
    except FileNotFoundError:
        raise
    except OSError:
        try:
            with lock.open("x", encoding="utf-8") as file:
                file.write(own.read_text(encoding="utf-8"))
            return True
        except FileExistsError:
            return False


def _read(lock: Path) -> Owner | None:
    """None for a lock that is not there, or not written yet."""
    try:
        return Owner(**json.loads(lock.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    """What processes that can see each other have in common."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: one host name, one machine
        return socket.gethostname()


def _started(pid: int) -> str:
    """When a process began, in the kernel's ticks; "gone" for one that has ended."""
    try:
        # The name, in brackets, may hold anything; state and 19 more fields follow it, the start is the last of them.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return "gone" if fields[0] in "ZX" else fields[19]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return "gone"
    try:
        os.kill(pid, 0)
        return ""
    except PermissionError:
        return ""
    except OSError:
        return "gone"
