"""The audit log: events with an order, a time, an actor, and a chain of hashes that shows any later change."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from vlmalign.review.database import Database

START = "0" * 64  #: what stands before the first event
COORDINATOR = "coordinator"


@dataclass(frozen=True)
class Event:
    seq: int
    at: float  #: Unix seconds of the server's clock
    actor: str
    kind: str
    position: int | None
    body: dict[str, Any]
    chain: str


def write(
    connection: sqlite3.Connection,
    at: float,
    actor: str,
    kind: str,
    body: dict[str, Any],
    *,
    position: int | None = None,
    key: str | None = None,
) -> None:
    """Add an event, within the caller's transaction."""
    last = connection.execute("SELECT seq, chain FROM event ORDER BY seq DESC LIMIT 1").fetchone()
    seq, before = (last["seq"] + 1, last["chain"]) if last else (1, START)
    text = canonical(body)
    connection.execute(
        "INSERT INTO event (seq, at, actor, kind, position, body, key, chain) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (seq, at, actor, kind, position, text, key, link(before, seq, at, actor, kind, position, text)),
    )


def canonical(body: Any) -> str:
    return json.dumps(body, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def link(before: str, seq: int, at: float, actor: str, kind: str, position: int | None, body: str) -> str:
    """The hash of an event: of all its fields and of the hash before it."""
    return hashlib.sha256(canonical([before, seq, at, actor, kind, position, body]).encode("ascii")).hexdigest()


def events(database: Database) -> list[Event]:
    """All events, in order, the chain checked.

    Raises:
        ValueError: naming the first event that was changed, removed or put in afterwards.
    """
    with database.reading() as connection:
        rows = connection.execute("SELECT * FROM event ORDER BY seq").fetchall()
    return list(_checked(rows))


def _checked(rows: list[sqlite3.Row]) -> Iterator[Event]:
    before = START
    for expected, row in enumerate(rows, start=1):
        chain = link(before, row["seq"], row["at"], row["actor"], row["kind"], row["position"], row["body"])
        if row["seq"] != expected or row["chain"] != chain:
            raise ValueError(
                f"the audit log was changed from outside: event {expected} does not follow from those before it; restore the "
                "database from a copy"
            )
        before = chain
        yield Event(row["seq"], row["at"], row["actor"], row["kind"], row["position"], json.loads(row["body"]), chain)


def backward_steps(found: list[Event]) -> int:
    """How many events are dated before the one that they follow: the server's clock was set back."""
    return sum(later.at < earlier.at for earlier, later in pairwise(found))
