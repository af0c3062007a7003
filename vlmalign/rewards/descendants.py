"""What the processes of rewards have started, and how it ends with them (Linux; elsewhere by process group alone).

A worker takes in what its children leave behind (`take_in_orphans`), so that a daemon, which no process group and no
session holds, stays below it in the tree of processes. Where a worker has died by itself its children are known by a mark
in the environment that they were started with.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

#: variable by which a worker's children are known
MARK = "VLMALIGN_REWARD_WORKER"
#: prctl's option, from linux/prctl.h
_SET_CHILD_SUBREAPER = 36


def take_in_orphans() -> None:
    """Make this process the parent of its descendants whose own parent has ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(pid: int | None, mark: str) -> None:
    """Kill all that `pid` has below it (None: it has ended), and every process that has its mark; not itself, and not this
    process."""
    spared = {pid, os.getpid()}
    while found := (set(_below(pid)) | set(_marked(mark))) - spared:
        for each in found:
            with suppress(OSError):  # gone, or somebody else's
                os.kill(each, signal.SIGKILL)
        spared |= found  # one that is killed may be there for a moment; what it has started meanwhile is looked for


def _below(pid: int | None) -> Iterator[int]:
    """Processes below `pid` in the tree of processes."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in brackets, may hold anything; the state and the parent follow it.
            state, parent = (
                (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:2]
            )
        except (OSError, ValueError):  # gone
            continue
        if state not in "ZX":
            children.setdefault(int(parent), []).append(int(folder.name))
    waiting = [] if pid is None else [pid]
    while waiting:
        for child in children.get(waiting.pop(), ()):
            waiting.append(child)
            yield child


def _marked(mark: str) -> Iterator[int]:
    """Processes that were started with this mark in their environment."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*") if mark else ():
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield int(folder.name)
        except OSError:  # gone, or somebody else's
            continue
