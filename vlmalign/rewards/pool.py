"""Worker processes for rewards that compute: chunks out, values back, and a bound on the time of every call.

A chunk whose call hangs, dies or raises is tried again one completion at a time, so only the culprits lose their
number. A worker is a fresh interpreter, never a fork (JAX's threads hold locks that a fork would copy), and it does
not import the main script again, as multiprocessing's spawn would (a script that imports JAX costs every worker
seconds and a gigabyte; a notebook has no script at all). So rewards must be importable, or come from a user file.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Pipe, wait
from pathlib import Path
from typing import NamedTuple

from vlmalign.rewards.contract import Batch, Fault, Reward, Value, WrongReturn
from vlmalign.rewards.descendants import MARK, end_descendants
from vlmalign.rewards.output import BoundedOutput
from vlmalign.rewards.worker import Call, Reply, reply_of

#: seconds within which a worker must have started and loaded the rewards
START_S = 60.0
#: bytes of an answer that does not end
LONGEST = 2**26
#: what is no answer to the call that was made, and what is no answer at all
UNHEARD, GARBLED = Reply(-1, "unheard"), Reply(-1, "garbled")

_BOOT = "import sys; sys.path[:] = {path!r}; from vlmalign.rewards.worker import serve; serve({calls}, {replies})"
#: A reward in a worker must not take the GPU that trains; and a sum over a set must come out the same in every worker.
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}


class Task(NamedTuple):
    """One call to be made: a reward on consecutive completions."""

    reward: str
    rows: range


def chunks(count: int, size: int) -> list[range]:
    """0..count-1 in consecutive pieces of `size`, the last one shorter.

    >>> chunks(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def picklable(rewards: Mapping[str, Reward]) -> dict[str, bytes]:
    """Each reward as bytes for the workers. Raises ValueError naming one that cannot travel."""
    blobs = {}
    for name, reward in rewards.items():
        advice = "define it in a module that can be imported, load it with load_user_reward, or set workers=0"
        try:
            blobs[name] = pickle.dumps(reward)
        except Exception as error:  # pickling runs the reward's own code
            raise ValueError(f"reward {name!r} cannot be sent to a worker process ({error}); {advice}") from error
        if "__main__" in (getattr(reward, "__module__", None), type(reward).__module__):
            raise ValueError(f"reward {name!r} is defined in the running script, which workers do not import; {advice}")
    return blobs


class Worker:
    """One process and our ends of its pipes. `state`: starting -> loading -> idle <-> busy."""

    def __init__(self, blobs: Mapping[str, bytes], output: int | None = None):
        """`output` is a descriptor that takes what it prints (None: as the main process)."""
        self._blobs = dict(blobs)
        theirs, self._calls = Pipe(duplex=False)
        self.replies, answers = os.pipe()
        self._mark, self._buffer, self._number = secrets.token_hex(8), b"", 0
        path = [entry or os.getcwd() for entry in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT.format(path=path, calls=theirs.fileno(), replies=answers)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            pass_fds=[theirs.fileno(), answers],
            env=os.environ | _ENVIRONMENT | {MARK: self._mark},
            start_new_session=True,  # Ctrl-C is the main process's affair; `kill` reaches a reward's own children
        )
        theirs.close()
        os.close(answers)
        self.state = "starting"
        self.task: Task | None = None
        self.deadline = time.monotonic() + START_S

    def give(self, task: Task, call: bytes, limit_s: float) -> None:
        self._number += 1
        self.state, self.task, self.deadline = "busy", task, time.monotonic() + limit_s
        self._calls.send_bytes(self._number.to_bytes(8, "big") + call)

    def receive(self) -> Reply | None:
        """Its next word, once it has said something: what is no answer to its call is `UNHEARD`, what is no answer at all
        `GARBLED`; None when the process is gone."""
        data = os.read(self.replies, 2**20)
        if not data:
            return None
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        if len(self._buffer) > LONGEST:
            return GARBLED
        for line in lines:
            try:
                reply = reply_of(line)
            except ValueError:
                return GARBLED
            if reply.number == self._number:
                return self._heard(reply)
        return UNHEARD

    def _heard(self, reply: Reply) -> Reply | None:
        if reply.kind == "ready":
            self.state, self.deadline = "loading", time.monotonic() + START_S
            try:
                self._calls.send_bytes(pickle.dumps(self._blobs))
            except (BrokenPipeError, ConnectionResetError):
                return None
        elif reply.kind in ("loaded", "scored", "wrong"):
            self.state = "idle"
        return reply

    def alive(self) -> bool:
        return self._process.poll() is None

    def death(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code == -signal.SIGKILL:
            return "killed by SIGKILL (out of memory?)"
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """End the process and whatever it started, at once."""
        self._close_ends()
        pid = self._process.pid
        if (
            self._process.returncode is None
        ):  # not yet waited for, so its number and its process group's are still its own
            end_descendants(pid, self._mark)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        self._process.wait()
        end_descendants(None, self._mark)

    def close(self) -> None:
        """Let an idle process end by itself, since its calls end; then what it started is ended too."""
        self._calls.close()
        with contextlib.suppress(ChildProcessError, AttributeError):
            deadline = time.monotonic() + 1.0
            # It is not waited for yet: its process group's number stays its own.
            while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                if time.monotonic() > deadline:
                    break
                time.sleep(0.005)
        self.kill()

    def _close_ends(self) -> None:
        self._calls.close()
        if self.replies >= 0:
            os.close(self.replies)
            self.replies = -1


class WorkerPool:
    """`workers` processes, started at once; they load the rewards while the caller does other things.

    A call has `timeout_s` seconds, on a chunk as on a single completion. With n completions of which none is scored
    in time, one reward takes at most (n + n / chunk) x timeout_s / workers, and a start (about 0.1 s) per time-out.
    """

    def __init__(
        self, rewards: Mapping[str, Reward], *, workers: int, chunk: int, timeout_s: float, output: Path | None = None
    ):
        self._blobs, self._chunk, self._timeout_s = picklable(rewards), chunk, timeout_s
        self._output = BoundedOutput(output)
        self._workers = [Worker(self._blobs, self._output.writing) for _ in range(workers)]

    def run(self, batch: Batch) -> dict[str, list[Value]]:
        """Every reward on every completion. What comes back does not depend on the number of workers or chunks.

        Raises WrongReturn for a reward's wrong return, ValueError for one that cannot be loaded or columns that
        cannot be sent, RuntimeError when workers cannot be started. The pool can be used again afterwards.
        """
        values: dict[str, list[Value]] = {name: [None] * len(batch) for name in self._blobs}
        queue = deque(Task(name, rows) for rows in chunks(len(batch), self._chunk) for name in self._blobs)
        for worker in self._workers:
            if worker.state != "idle":  # it may be long since it was started: its time counts from here
                worker.deadline = time.monotonic() + START_S
        try:
            while queue or any(worker.task for worker in self._workers):
                self._hand_out(queue, batch)
                for index, speaks in self._events():
                    outcome = self._outcome(index) if speaks else self._too_late(index)
                    if outcome is None:
                        continue
                    task, found = outcome
                    if not isinstance(found, Fault):
                        values[task.reward][task.rows.start : task.rows.stop] = found
                    elif len(task.rows) == 1:
                        values[task.reward][task.rows.start] = found
                    else:
                        queue.extendleft(Task(task.reward, range(row, row + 1)) for row in reversed(task.rows))
        except BaseException:
            self._replace_all_but_idle()
            raise
        return values

    def close(self) -> None:
        for worker in self._workers:
            if worker.task is None and worker.state == "idle":
                worker.close()
            else:
                worker.kill()
        if self._workers:
            self._output.close()
        self._workers = []

    def _hand_out(self, queue: deque[Task], batch: Batch) -> None:
        for index, worker in enumerate(self._workers):
            if not queue or worker.state != "idle":
                continue
            if not worker.alive():  # died between two calls: no completion is to blame
                self._replace(index)
                continue
            task = queue.popleft()
            call = _packed(Call(task.reward, batch.take(task.rows), self._timeout_s))
            # Died this instant: then its end of the pipe reads as closed, which `_outcome` deals with.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                worker.give(task, call, self._timeout_s)

    def _events(self) -> Sequence[tuple[int, bool]]:
        """(worker, True) of those that have something to say, or (worker, False) of those whose time is up."""
        open_ends = {worker.replies: i for i, worker in enumerate(self._workers) if worker.state != "idle"}
        nearest = min((self._workers[i].deadline for i in open_ends.values()), default=time.monotonic())
        ready = wait(list(open_ends), timeout=max(0.0, nearest - time.monotonic()))
        if ready:
            return sorted((open_ends[end], True) for end in ready)
        now = time.monotonic()
        return [(i, False) for i in open_ends.values() if self._workers[i].deadline <= now]

    def _too_late(self, index: int) -> tuple[Task, Fault]:
        task = self._workers[index].task
        if task is None:
            raise RuntimeError(
                f"a reward worker did not load its rewards within {START_S:g} s; "
                "look for work done at the import of a reward's module"
            )
        self._replace(index)
        return task, Fault("timeout", f"no answer within {self._timeout_s:g} s")

    def _outcome(self, index: int) -> tuple[Task, list[Value] | Fault] | None:
        """A worker's task and what became of it; None while it starts."""
        worker = self._workers[index]
        task, starting = worker.task, worker.task is None
        reply = worker.receive()
        if reply is UNHEARD:  # what is written there by others must not keep its time from running out
            return self._too_late(index) if time.monotonic() > worker.deadline else None
        if reply is None or reply is GARBLED:
            death = worker.death() if reply is None else "wrote something into its pipe that is no answer"
            if starting:
                raise RuntimeError(
                    f"a reward worker {death} while {worker.state}; import the rewards by hand to see why"
                )
            self._replace(index)
            return task, Fault("crash", f"the worker process {death}")
        if reply.kind == "refused":
            raise ValueError(f"a worker process cannot load {reply.text}; make it importable, or set workers=0")
        if starting:
            return None
        worker.task = None
        if reply.kind == "wrong":
            raise WrongReturn(reply.text)
        assert task is not None
        assert reply.values is not None
        return task, reply.values

    def _replace(self, index: int) -> None:
        """A fresh worker in this one's place."""
        self._workers[index].kill()
        self._workers[index] = Worker(self._blobs, self._output.writing)

    def _replace_all_but_idle(self) -> None:
        for index, worker in enumerate(self._workers):
            if worker.task is not None or worker.state != "idle":
                self._replace(index)


def _packed(call: Call) -> bytes:
    try:
        return pickle.dumps(call)
    except Exception as error:  # pickling runs the values' own code
        raise ValueError(
            f"the columns {sorted(call.batch.columns)} of reward {call.reward!r} hold something that cannot be sent to "
            f"a worker process ({error}); pass plain values, or set workers=0"
        ) from error
