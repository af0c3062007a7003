"""A person's way through the pages: open, save, undo, close. One page at a time, in order; a closed page stays closed.

Every request that writes has a key of its own. A request that comes twice (the network lost the answer to the first) is
written once and answered alike.
"""

from __future__ import annotations

import json
import re
import sqlite3
from dataclasses import dataclass
from typing import Any

from vlmalign.review import audit, form
from vlmalign.review.assignment import Place
from vlmalign.review.database import Database
from vlmalign.review.form import Entry
from vlmalign.review.freezing import check_current, freeze, place
from vlmalign.review.material import Study
from vlmalign.review.refusal import Refused

EMPTY: Entry = {"answers": {}}
KEY = re.compile(r"[A-Za-z0-9-]{8,80}")
MOST_MS = 30 * 86_400_000  #: a page is open for a month at most


@dataclass(frozen=True)
class Page:
    """The page that is the person's turn, with what was entered so far."""

    place: Place
    entry: Entry
    revision: int  #: how many saves and undos there were; a request must name the one it goes on from
    active_ms: int  #: for how long the page has been before the person's eyes
    can_undo: bool
    pages: int  #: all of the person


@dataclass(frozen=True)
class Change:
    """A request that writes."""

    position: int
    revision: int
    key: str
    active_ms: int  #: by the browser's stopwatch, which runs only while the page is visible
    entry: Any = None


@dataclass(frozen=True)
class Saved:
    revision: int
    entry: Entry
    can_undo: bool


def current(database: Database, name: str) -> Page | None:
    """The first page that is not closed, opened now if it was not before; None when all are closed."""
    with database.reading() as connection:
        row = _current(connection, name)
        if row is None:
            return None
        if row["opened_at"] is not None:
            return _page(connection, name, row)
    with database.transaction() as connection:
        row = _current(connection, name)
        if row is None:
            return None
        if row["opened_at"] is None:
            at = database.clock()
            connection.execute(
                "INSERT INTO vote (person, position, opened_at, revision, active_ms, body) VALUES (?, ?, ?, 0, 0, ?)",
                (name, row["position"], at, audit.canonical(EMPTY)),
            )
            audit.write(connection, at, name, "open", {}, position=row["position"])
            row = _current(connection, name)
            assert row is not None
        return _page(connection, name, row)


def count(database: Database, name: str) -> int:
    """How many pages the person has in all."""
    with database.reading() as connection:
        return connection.execute("SELECT count(*) FROM place WHERE person = ?", (name,)).fetchone()[0]


def save(database: Database, study: Study, name: str, change: Change) -> Saved:
    """Keep what is entered so far. Raises Refused for a page that is not open, or was changed elsewhere in between."""
    return _write(database, study, name, change, "save")


def undo(database: Database, study: Study, name: str, change: Change) -> Saved:
    """Go back by one save. Raises Refused where there is none."""
    return _write(database, study, name, change, "undo")


def close(database: Database, study: Study, name: str, change: Change) -> Saved:
    """The vote: what is entered is final. Raises Refused when something is missing, naming it."""
    return _write(database, study, name, change, "close")


def _write(database: Database, study: Study, name: str, change: Change, kind: str) -> Saved:
    if not 0 <= change.active_ms <= MOST_MS or not KEY.fullmatch(change.key):
        raise Refused("The request is not one that this page sends.", 400)
    with database.transaction() as connection:
        if (again := _again(connection, name, change, kind)) is not None:
            return again
        at, version = database.clock(), check_current(connection, study)
        row = _current(connection, name)
        if row is None or row["position"] != change.position or row["opened_at"] is None:
            raise Refused("This case is closed. Load the page again to go on.")
        if row["revision"] != change.revision:
            raise Refused("This case was changed in another window. Load the page again to see it.")
        own = place(row)
        past = _past(connection, name, change.position)
        entry = past[-2] if kind == "undo" and len(past) > 1 else None
        if kind == "undo" and entry is None:
            raise Refused("There is nothing to undo.")
        if entry is None:
            entry = form.check(study.protocol.form, own.purpose, own.letters, study.protocol.guesses, change.entry)
        if kind == "close" and (lacking := form.missing(study.protocol.form, own.purpose, own.letters, entry)):
            raise Refused("Still to fill in: " + "; ".join(lacking) + ".", 422)
        kept = len(past) + {"save": 1, "undo": -1, "close": 0}[kind]
        saved = Saved(row["revision"] + 1, entry, kept > 1)
        active = max(row["active_ms"], change.active_ms)
        freeze(connection, at, version)
        body = {"entry": entry, "revision": saved.revision, "active_ms": active, "protocol": version.version}
        connection.execute(
            "UPDATE vote SET body = ?, revision = ?, active_ms = ?, protocol = ?, closed_at = ? WHERE person = ? AND position = ?",
            (
                audit.canonical(entry),
                saved.revision,
                active,
                body["protocol"],
                at if kind == "close" else None,
                name,
                change.position,
            ),
        )
        audit.write(connection, at, name, kind, body, position=change.position, key=change.key)
    return saved


def _again(connection: sqlite3.Connection, name: str, change: Change, kind: str) -> Saved | None:
    """What was answered to the same request before; None for a new one."""
    row = connection.execute("SELECT * FROM event WHERE actor = ? AND key = ?", (name, change.key)).fetchone()
    if row is None:
        return None
    body = json.loads(row["body"])
    if (row["kind"], row["position"], body["revision"]) != (kind, change.position, change.revision + 1):
        raise Refused("The key of this request was used before. Load the page again.", 400)
    return Saved(body["revision"], body["entry"], len(_past(connection, name, change.position)) > 1)


def _current(connection: sqlite3.Connection, name: str) -> sqlite3.Row | None:
    """The first place of the person that is not closed, with the vote as far as there is one."""
    return connection.execute(
        "SELECT p.*, v.opened_at, v.revision, v.active_ms, v.body FROM place p"
        " LEFT JOIN vote v ON v.person = p.person AND v.position = p.position"
        " WHERE p.person = ? AND v.closed_at IS NULL ORDER BY p.position LIMIT 1",
        (name,),
    ).fetchone()


def _page(connection: sqlite3.Connection, name: str, row: sqlite3.Row) -> Page:
    count = connection.execute("SELECT count(*) FROM place WHERE person = ?", (name,)).fetchone()[0]
    return Page(
        place(row),
        json.loads(row["body"]),
        row["revision"],
        row["active_ms"],
        len(_past(connection, name, row["position"])) > 1,
        count,
    )


def _past(connection: sqlite3.Connection, name: str, position: int) -> list[Entry]:
    """The entries that undo leads back through, the present one last: a save adds one, an undo takes one away."""
    past: list[Entry] = [EMPTY]
    rows = connection.execute(
        "SELECT kind, body FROM event WHERE actor = ? AND position = ? AND kind IN ('save', 'undo') ORDER BY seq",
        (name, position),
    )
    for row in rows:
        if row["kind"] == "undo":
            past.pop()
        else:
            past.append(json.loads(row["body"])["entry"])
    return past
