"""A run that is told to end (SIGTERM, SIGHUP, or the warning that a scheduler sends before it) ends well: it finishes the
step that it is at, saves, and leaves with an exit code of its own. SIGINT still interrupts at once, and `kill -9` loses
nothing but the work since the last checkpoint.

In a run of several processes any of them may be told; JAX's preemption service lets all of them agree on the step after
which they save.
"""

from __future__ import annotations

import os
import signal

from vlmalign.distributed import process_count

#: exit code of a run that was told to end and has saved: the same command goes on
STOPPED = 85

#: what tells a run to end: kill, a closed terminal, and the signals that schedulers are asked to warn with
SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_came: str | None = None
_calls, _agreed = 0, False


class Stopped(Exception):
    """The run was told to end, and has saved; says where it stands, and what told it (`by`)."""

    def __init__(self, where: str):
        super().__init__(where)
        self.by = _came or "a signal"


def install() -> None:
    """Take the signals from here on; called after `distributed.start`. One that is ignored (nohup) stays so."""
    alone = process_count() == 1
    for number in SIGNALS:
        if number == signal.SIGTERM and not alone:
            continue  # JAX has it
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _remember if alone else _pass_on)


def requested() -> bool:
    """Whether the run is to end now. All processes call this at the same moments, and are told so at the same one."""
    global _calls, _agreed
    if process_count() == 1:
        return _came is not None
    from jax.experimental import multihost_utils

    _calls += 1
    _agreed = _agreed or multihost_utils.reached_preemption_sync_point(_calls)  # which says so once
    return _agreed


def check(where: str) -> None:
    """Raises `Stopped` when a run of one process is to end; for work that processes do each by itself."""
    if process_count() == 1 and _came is not None:
        raise Stopped(where)


def _remember(number: int, frame: object) -> None:
    global _came
    _came = signal.Signals(number).name


def _pass_on(number: int, frame: object) -> None:
    """JAX's preemption service listens to SIGTERM alone."""
    _remember(number, frame)
    os.kill(os.getpid(), signal.SIGTERM)
