"""The worker process: loads rewards once, then scores one chunk a call until its calls end.

It is started as a fresh interpreter (see `pool`), imports no JAX, sees no GPU, and is disposable: whatever a reward
does to it, the main process kills it and starts another. Calls come pickled; answers go back as lines of JSON with the
number of their call, so that nothing that a reward or a child of it writes is taken for one.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from vlmalign.rewards.contract import Batch, Fault, Reward, Value, WrongReturn, attempt, fault_of
from vlmalign.rewards.descendants import MARK, end_descendants, take_in_orphans

#: seconds after the time-out at which an orphaned worker ends itself
ORPHAN_GRACE_S = 5.0


class Call(NamedTuple):
    """Main process -> worker: score this."""

    reward: str
    batch: Batch
    limit_s: float  #: the main process kills the worker after this


class Reply(NamedTuple):
    """Worker -> main process."""

    number: int  #: of the call; 0 before the first
    kind: str  #: "ready", "loaded", "refused" (rewards could not be loaded), "scored" or "wrong" (WrongReturn)
    values: list[Value] | Fault | None = None
    text: str = ""

    def line(self) -> bytes:
        values = self.values
        coded = {"fault": list(values)} if isinstance(values, Fault) else values and [_coded(value) for value in values]
        return json.dumps([self.number, self.kind, coded, self.text]).encode() + b"\n"


def reply_of(line: bytes) -> Reply:
    """Raises ValueError for a line that is no reply."""
    try:
        number, kind, coded, text = json.loads(line)
        values = Fault(*coded["fault"]) if isinstance(coded, dict) else coded and [_decoded(value) for value in coded]
        return Reply(int(number), str(kind), values, str(text))
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ValueError("no reply of a worker") from error


def _coded(value: Value) -> Any:
    return list(value) if isinstance(value, Fault) else value


def _decoded(value: Any) -> Value:
    return Fault(*value) if isinstance(value, list) else value


def serve(calls: int, replies: int) -> None:
    """Answer until the other end closes; the first message holds the rewards, each pickled apart."""
    connection, me = Connection(calls, writable=False), os.getpid()
    take_in_orphans()
    # A child must neither answer in its parent's place nor keep the pipe open after its parent's death.
    os.register_at_fork(after_in_child=lambda: (os.close(calls), os.close(replies)))

    def say(reply: Reply) -> None:
        data = memoryview(reply.line())
        while data:
            data = data[os.write(replies, data) :]

    try:
        say(Reply(0, "ready"))
        blobs: dict[str, bytes] = pickle.loads(connection.recv_bytes())
        rewards: dict[str, Reward] = {}
        for name, blob in blobs.items():
            try:
                rewards[name] = pickle.loads(blob)
            except Exception as error:
                traceback.print_exc()
                say(Reply(0, "refused", text=f"reward {name!r}: {type(error).__name__}: {error}"))
                return
        say(Reply(0, "loaded"))
        while True:
            message = connection.recv_bytes()
            answer = _answer(int.from_bytes(message[:8], "big"), message[8:], rewards)
            if os.getpid() != me:  # a child that a reward forked, and that came back here
                os._exit(0)
            say(answer)
    except (EOFError, OSError):  # the main process has closed its end, or is gone
        return
    finally:
        if os.getpid() == me:
            end_descendants(me, os.environ.get(MARK, ""))


def _answer(number: int, message: bytes, rewards: dict[str, Reward]) -> Reply:
    try:
        call: Any = pickle.loads(message)
    except Exception as error:  # a column of a class that cannot be imported here
        return Reply(number, "scored", fault_of(error))
    # SIGALRM's default action ends the process from within the kernel, also inside a C loop that never returns to
    # Python: when the main process was killed, nobody else is left to end a reward that hangs.
    signal.setitimer(signal.ITIMER_REAL, call.limit_s + ORPHAN_GRACE_S)
    try:
        return Reply(
            number, "scored", attempt(call.reward, rewards[call.reward], call.batch, traceback.print_exception)
        )
    except WrongReturn as error:
        return Reply(number, "wrong", text=str(error))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.flush()
