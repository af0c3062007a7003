"""Rewards that wait (`async def`: a judge behind an API): each on its own event loop, all of them at the same time.

They run in the main process, because they wait rather than compute and often hold a client that cannot be pickled.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future

from vlmalign.rewards.contract import Batch, Fault, Reward, Value, checked, fault_of
from vlmalign.rewards.pool import chunks


class AsyncReward:
    """One async reward with its own thread and event loop, kept between calls so that its client can be too.

    All chunks are awaited at once. A chunk that times out or raises is awaited again one completion at a time; only
    the culprits get a fault. An async function that blocks (`time.sleep` in place of `asyncio.sleep`) cannot be
    stopped: when the bound on the whole has passed, its thread is abandoned and what it has not answered timed out.
    """

    def __init__(self, name: str, reward: Reward, *, chunk: int, timeout_s: float):
        self._name, self._reward = name, reward
        self._chunk, self._timeout_s = chunk, timeout_s
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: tuple[Future[None], list[Value], float] | None = None

    def start(self, batch: Batch) -> None:
        """Begin; `finish` gives the values."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=_serve, args=(self._loop,), name=f"reward {self._name}", daemon=True).start()
        unanswered = Fault("timeout", "blocked its event loop; an async reward must await, never sleep or compute")
        values: list[Value] = [unanswered] * len(batch)
        # A chunk, then each of its completions; a second for the loop's own doings.
        bound = time.monotonic() + self._timeout_s * (1 + min(self._chunk, len(batch))) + 1.0
        work = self._all(batch, values)
        self._running = (asyncio.run_coroutine_threadsafe(work, self._loop), values, bound)

    def finish(self) -> list[Value]:
        """A value per completion of the batch that was started. Raises WrongReturn."""
        future, values, bound = self._running
        self._running = None
        try:
            future.result(max(0.0, bound - time.monotonic()))
        except TimeoutError:
            future.cancel()
            self._leave()
            return list(values)
        return values

    def cancel(self) -> None:
        """Drop what is under way, after an error elsewhere."""
        if self._running is not None:
            self._running[0].cancel()
            self._running = None

    def close(self) -> None:
        self.cancel()
        self._leave()

    def _leave(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._loop = None

    async def _all(self, batch: Batch, values: list[Value]) -> None:
        pieces = chunks(len(batch), self._chunk)
        for outcome in await asyncio.gather(
            *(self._piece(batch, rows, values) for rows in pieces), return_exceptions=True
        ):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _piece(self, batch: Batch, rows: range, values: list[Value]) -> None:
        found = await self._attempt(batch.take(rows))
        if not isinstance(found, Fault):
            values[rows.start : rows.stop] = found
        elif len(rows) == 1:
            values[rows.start] = found
        else:
            for row in rows:
                await self._piece(batch, range(row, row + 1), values)

    async def _attempt(self, batch: Batch) -> Sequence[Value] | Fault:
        try:
            async with asyncio.timeout(self._timeout_s) as clock:
                returned = await self._reward(**batch.arguments())
        except (Exception, SystemExit, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and asyncio.current_task().cancelling():
                raise  # by `cancel`, not by the reward itself
            if clock.expired():
                return Fault("timeout", f"no answer within {self._timeout_s:g} s")
            return fault_of(error)
        return checked(self._name, returned, len(batch))


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()
