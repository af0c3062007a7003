"""Who may come in: personal links that open one session each, sessions, and the withdrawal of a person.

Tokens are 256 random bits; only their SHA-256 is kept. That is enough for random tokens: there is nothing to guess from.
"""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass

from vlmalign.review import audit
from vlmalign.review.database import Database
from vlmalign.review.refusal import Refused

DAY = 86_400.0
LINK_DAYS = 30  #: a link that has not been used by then opens nothing
SESSION_DAYS = 120

Token = Callable[[], str]


def new_token() -> str:
    """256 random bits, as 43 characters that may stand in a URL."""
    return secrets.token_urlsafe(32)


@dataclass(frozen=True)
class Person:
    name: str
    role: str
    begun: bool


def invite(database: Database, name: str, *, token: Token = new_token) -> str:
    """A token for the person's link. Links of the person that have not been used are void from now on; sessions go on.

    Raises:
        ValueError: for somebody who is not in the protocol, or was withdrawn.
    """
    made = token()
    with database.transaction() as connection:
        at = database.clock()
        row = connection.execute("SELECT * FROM person WHERE name = ?", (name,)).fetchone()
        if row is None:
            raise ValueError(f"{name} is not in the protocol; it names {', '.join(_names(connection))}")
        if row["withdrawn_at"] is not None:
            raise ValueError(f"{name} was withdrawn; name a replacement in the protocol")
        connection.execute("DELETE FROM invitation WHERE person = ? AND used_at IS NULL", (name,))
        connection.execute("INSERT INTO invitation VALUES (?, ?, ?, NULL)", (_hash(made), name, at + LINK_DAYS * DAY))
        audit.write(connection, at, audit.COORDINATOR, "invite", {"person": name})
    return made


def enter(database: Database, given: str, *, token: Token = new_token) -> str:
    """The token of a new session, for the token of a link that has not been used before.

    Raises:
        Refused: for any other token. What is wrong with it is not told.
    """
    made = token()
    with database.transaction() as connection:
        at = database.clock()
        row = connection.execute(
            "SELECT i.person FROM invitation i JOIN person p ON p.name = i.person"
            " WHERE i.hash = ? AND i.used_at IS NULL AND i.expires > ? AND p.withdrawn_at IS NULL",
            (_hash(given), at),
        ).fetchone()
        if row is None:
            raise Refused(
                "This link does not work: it was used before, is too old, or is not complete. Ask for a new one.", 403
            )
        connection.execute("UPDATE invitation SET used_at = ? WHERE hash = ?", (at, _hash(given)))
        connection.execute(
            "INSERT INTO session VALUES (?, ?, ?)", (_hash(made), row["person"], at + SESSION_DAYS * DAY)
        )
        audit.write(connection, at, row["person"], "enter", {})
    return made


def without_session(database: Database) -> list[str]:
    """Everyone who is in the study and has no session."""
    with database.reading() as connection:
        rows = connection.execute(
            "SELECT name FROM person WHERE withdrawn_at IS NULL AND name NOT IN (SELECT person FROM session) ORDER BY name"
        )
        return [row["name"] for row in rows]


def session(database: Database, given: str) -> Person | None:
    """Whose session it is; None when it is nobody's, or ended."""
    with database.reading() as connection:
        row = connection.execute(
            "SELECT p.name, p.role, p.begun_at FROM session s JOIN person p ON p.name = s.person"
            " WHERE s.hash = ? AND s.expires > ? AND p.withdrawn_at IS NULL",
            (_hash(given), database.clock()),
        ).fetchone()
    return None if row is None else Person(row["name"], row["role"], row["begun_at"] is not None)


def begin(database: Database, name: str) -> None:
    """The person has read the instructions and agreed to take part."""
    with database.transaction() as connection:
        at = database.clock()
        done = connection.execute("UPDATE person SET begun_at = ? WHERE name = ? AND begun_at IS NULL", (at, name))
        if done.rowcount:
            audit.write(connection, at, name, "begin", {})


def leave(database: Database, given: str) -> None:
    """End a session."""
    with database.transaction() as connection:
        row = connection.execute("SELECT person FROM session WHERE hash = ?", (_hash(given),)).fetchone()
        if row is not None:
            connection.execute("DELETE FROM session WHERE hash = ?", (_hash(given),))
            audit.write(connection, database.clock(), row["person"], "leave", {})


def withdraw(database: Database, name: str, reason: str, *, keep_votes: bool) -> None:
    """The person takes part no longer: links and sessions end. The votes stay in the record; an export shows them with
    `keep_votes`, and without it only counts them.

    Raises:
        ValueError: for somebody who is not in the study or was withdrawn before, or without a reason.
    """
    if not reason.strip():
        raise ValueError("a withdrawal needs a reason: --reason '...'")
    with database.transaction() as connection:
        at = database.clock()
        row = connection.execute("SELECT withdrawn_at FROM person WHERE name = ?", (name,)).fetchone()
        if row is None or row["withdrawn_at"] is not None:
            found = "was withdrawn before" if row else f"is not in the study, which has {', '.join(_names(connection))}"
            raise ValueError(f"{name} {found}")
        connection.execute(
            "UPDATE person SET withdrawn_at = ?, votes_kept = ? WHERE name = ?", (at, int(keep_votes), name)
        )
        connection.execute("DELETE FROM session WHERE person = ?", (name,))
        connection.execute("DELETE FROM invitation WHERE person = ? AND used_at IS NULL", (name,))
        body = {"person": name, "reason": reason.strip(), "votes": "kept" if keep_votes else "left out"}
        audit.write(connection, at, audit.COORDINATOR, "withdraw", body)


def _names(connection: sqlite3.Connection) -> list[str]:
    return [row["name"] for row in connection.execute("SELECT name FROM person ORDER BY name")]


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", errors="surrogatepass")).digest()
