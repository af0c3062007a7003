"""The worker process: loads rewards once, then scores one chunk a message until its pipe closes.

It is started as a fresh interpreter (see `pool`), imports no JAX, sees no GPU, and is disposable: whatever a reward
does to it, the main process kills it and starts another. `pool.Worker` holds the other end of the pipe.
"""

from __future__ import annotations

import pickle
import signal
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from vlmalign.rewards.contract import Batch, Fault, Reward, Value, WrongReturn, attempt, fault_of

#: seconds after the time-out at which an orphaned worker ends itself
ORPHAN_GRACE_S = 5.0


class Call(NamedTuple):
    """Main process -> worker: score this."""

    reward: str
    batch: Batch
    limit_s: float  #: the main process kills the worker after this


class Reply(NamedTuple):
    """Worker -> main process."""

    kind: str  #: "ready", "loaded", "refused" (rewards could not be loaded), "scored" or "wrong" (WrongReturn)
    values: list[Value] | Fault | None = None
    text: str = ""


def serve(descriptor: int) -> None:
    """Answer until the other end closes; the first message holds the rewards, each pickled apart."""
    connection = Connection(descriptor)
    connection.send(Reply("ready"))
    try:
        blobs: dict[str, bytes] = connection.recv()
        rewards: dict[str, Reward] = {}
        for name, blob in blobs.items():
            try:
                rewards[name] = pickle.loads(blob)
            except Exception as error:
                connection.send(Reply("refused", text=f"reward {name!r}: {fault_of(error).reason}"))
                return
        connection.send(Reply("loaded"))
        while True:
            connection.send(_answer(connection.recv_bytes(), rewards))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the main process has closed its end, or is gone
        return


def _answer(message: bytes, rewards: dict[str, Reward]) -> Reply:
    try:
        call: Any = pickle.loads(message)
    except Exception as error:  # a column of a class that cannot be imported here
        return Reply("scored", fault_of(error))
    # SIGALRM's default action ends the process from within the kernel, also inside a C loop that never returns to
    # Python: when the main process was killed, nobody else is left to end a reward that hangs.
    signal.setitimer(signal.ITIMER_REAL, call.limit_s + ORPHAN_GRACE_S)
    try:
        return Reply("scored", attempt(call.reward, rewards[call.reward], call.batch))
    except WrongReturn as error:
        return Reply("wrong", text=str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
