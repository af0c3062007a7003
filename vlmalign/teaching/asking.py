"""Traces from an endpoint: a bounded number of films at a time, each asked about until an answer passes the checks.

Each trace is on the disk before the next question of its worker. A run that ends in any way goes on with the films that
have no line yet; films that could not be sent or read are tried again, films whose answers failed only when asked to.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.data.films.images import BadImage
from vlmalign.progress import Progress
from vlmalign.teaching.endpoint import Endpoint, EndpointStopped, NotAnswered
from vlmalign.teaching.films import Asked, Film, data_uri
from vlmalign.teaching.teacher import Teacher
from vlmalign.teaching.trace_file import (
    Appended,
    Failed,
    Trace,
    failed_file,
    mend,
    read_failed,
    read_traces,
    same_origin,
    tokens,
    write_traces,
)

#: so many films one after the other without a reply, and the endpoint is taken to be down
MOST_UNANSWERED = 5


class Settings(NamedTuple):
    """How films are asked about."""

    concurrency: int = 4  #: films at a time
    asks: int = 3  #: answers that a film has to pass the checks
    side: int = 1024  #: pixels of the longer side of what is sent
    price_in: float = 0.0  #: of a million tokens
    price_out: float = 0.0
    again: bool = False  #: ask once more about films whose answers failed earlier


@dataclass
class State:
    """What is there, by film."""

    traces: dict[str, Trace]
    failed: dict[str, Failed]
    open: list[Film] = field(default_factory=list)  #: to be asked about
    written: int = 0  #: traces of this start
    unanswered: int = 0  #: films without a reply since the last that had one

    def cost(self, settings: Settings) -> tuple[int, int, float]:
        """Tokens in and out that these films took, on all starts, and their price."""
        tokens_in, tokens_out = tokens([*self.traces.values(), *self.failed.values()])
        return tokens_in, tokens_out, (tokens_in * settings.price_in + tokens_out * settings.price_out) / 1e6

    def reasons(self) -> Counter[str]:
        """Why films have no trace, and how many have none for it."""
        return Counter(reason for row in self.failed.values() for reason in row.reason.split("; "))


def write(
    path: Path, asked: Asked, teacher: Teacher, endpoint: Endpoint, model: str, settings: Settings, progress: Progress
) -> State:
    """Ask about the films that have no trace in `path` yet, and write what passes the checks there.

    Raises:
        EndpointStopped: when asking on is useless; what was written stays.
        ValueError: for a file of other traces, or a damaged one.
    """
    for file in (path, failed_file(path)):
        if mend(file):
            progress.say(f"{file}: the last line was cut off and is left out")
    traces = read_traces(path) if path.exists() else {}
    # A film that failed on one start may have its trace from a later one, which was killed before it tidied up.
    state = State(traces, {id: row for id, row in read_failed(failed_file(path)).items() if id not in traces})
    same_origin(path, state.traces, format=teacher.format, model=model)
    here = {film.id for film in asked.films}
    for film in asked.films:
        known = state.failed.get(film.id)
        if film.id in state.traces:
            if state.traces[film.id].labels != film.labels:
                raise ValueError(
                    f"{path}: the trace of {film.id} was written for other labels than the film has now; give another --out"
                )
        elif known is None or known.kind != "answer" or settings.again:
            state.open.append(film)
    total = len(asked.films)
    progress.stage("traces", max(1, total), start=total - len(state.open))
    lines, failures = Appended(path), Appended(failed_file(path))
    try:
        asyncio.run(_all(state, teacher, endpoint, model, settings, progress, (lines, failures), total))
    except ExceptionGroup as group:  # the first worker that failed ended the others
        raise group.exceptions[0] from None
    finally:
        lines.close()
        failures.close()
    write_traces(failed_file(path), state.failed.values())
    state.failed = {id: row for id, row in state.failed.items() if id in here}
    return state


async def _all(
    state: State,
    teacher: Teacher,
    endpoint: Endpoint,
    model: str,
    settings: Settings,
    progress: Progress,
    files: tuple[Appended, Appended],
    total: int,
) -> None:
    waiting = iter(state.open)
    done = total - len(state.open)

    async def work() -> None:
        nonlocal done
        for film in waiting:
            row = await _trace(film, teacher, endpoint, model, settings, state.failed.get(film.id))
            if isinstance(row, Trace):
                files[0].add(row)
                state.traces[film.id] = row
                state.failed.pop(film.id, None)  # what it took is counted in the trace
                state.written += 1
            else:
                files[1].add(row)
                state.failed[film.id] = row
            done += 1
            _count_unanswered(state, row)
            tokens_in, tokens_out, price = state.cost(settings)
            progress.update(done, failed=len(state.failed), tokens=tokens_in + tokens_out, cost=price)

    async with endpoint, asyncio.TaskGroup() as group:
        for _ in range(settings.concurrency):
            group.create_task(work())


def _count_unanswered(state: State, row: Trace | Failed) -> None:
    if isinstance(row, Trace) or row.kind == "answer":
        state.unanswered = 0
    elif row.kind == "endpoint":
        state.unanswered += 1
        if state.unanswered >= MOST_UNANSWERED:
            raise EndpointStopped(
                f"{state.unanswered} films in a row had no reply, the last because: {row.reason}; the same command goes on"
            )


async def _trace(
    film: Film, teacher: Teacher, endpoint: Endpoint, model: str, settings: Settings, before: Failed | None
) -> Trace | Failed:
    """The film's trace, or why there is none. `before` is what it took on an earlier start."""
    took = [0, 0, 0] if before is None else [before.asked, before.tokens_in, before.tokens_out]

    def line(of: type[Any], **own: str) -> Any:
        return of(
            id=film.id, labels=film.labels, image=film.image, format=teacher.format, model=model, instruction=teacher.digest,
            asked=took[0], tokens_in=took[1], tokens_out=took[2], **own,
        )  # fmt: skip

    try:
        image = await asyncio.to_thread(data_uri, film, settings.side)
    except (BadImage, FileNotFoundError) as error:
        return line(Failed, kind="image", reason=str(error))
    messages = question = teacher.question(film, image)
    faults: list[str] = []
    for _ in range(settings.asks):
        try:
            reply = await endpoint.ask(messages)
        except NotAnswered as error:
            return line(Failed, kind="endpoint", reason=str(error))
        took = [took[0] + 1, took[1] + reply.tokens_in, took[2] + reply.tokens_out]
        faults = teacher.faults(reply.text, film)
        if reply.finish not in ("stop", ""):
            faults = [f"ended early ({'length' if reply.finish == 'length' else 'not by the model'})", *faults]
        if not faults:
            return line(Trace, trace=reply.text)
        messages = teacher.again(question, reply.text, faults)
    return line(Failed, kind="answer", reason="; ".join(faults))
