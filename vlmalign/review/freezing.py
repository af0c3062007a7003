"""The protocol in the record: replaced freely before the first vote, frozen by it, and amended with date and reason after it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmalign.config import dump_config
from vlmalign.config_yaml import read_yaml
from vlmalign.review import audit
from vlmalign.review.assignment import Place, assign
from vlmalign.review.database import Database
from vlmalign.review.identity import differences
from vlmalign.review.material import Study
from vlmalign.review.protocol import AMENDABLE, Protocol
from vlmalign.review.refusal import Refused

Row = sqlite3.Row


@dataclass(frozen=True)
class Version:
    """One version of the protocol."""

    version: int
    hash: str
    settings: dict[str, Any]
    contents: dict[str, Any]
    text: str  #: YAML
    at: float
    reason: str | None
    frozen_at: float | None


def register(database: Database, study: Study) -> Version:
    """The study's protocol in the record: written if it is new or no vote is in yet, else compared.

    Raises:
        ValueError: when votes are in and the protocol differs from the one they were given under, naming what differs.
    """
    with database.transaction() as connection:
        latest = _latest(connection)
        if latest is None or (latest.hash != study.hash and latest.frozen_at is None):
            _replace(connection, database.clock(), study, latest)
        elif latest.hash != study.hash:
            raise ValueError(
                f"the protocol was frozen at the first vote (version {latest.version}), and this one differs: "
                f"{_told(_changes(latest, study))}. Restore it, or record the change: `vlmalign review amend STUDY --reason '...'`"
            )
        found = _latest(connection)
        assert found is not None
        return found


def amend(database: Database, study: Study, reason: str) -> tuple[Version, dict[str, tuple[Any, Any]]]:
    """A dated version of a frozen protocol, with its reason, and what it changes.

    Raises:
        ValueError: without a reason, before the first vote, without a change, or for a change that would make votes that are
            in mean something else.
    """
    if not reason.strip():
        raise ValueError("an amendment needs a reason: --reason '...'")
    with database.transaction() as connection:
        latest = _latest(connection)
        if latest is None or latest.frozen_at is None:
            raise ValueError("no vote is in yet: the protocol may still be changed freely, and needs no amendment")
        changes = _changes(latest, study)
        if not changes:
            raise ValueError(f"the protocol is that of version {latest.version}; there is nothing to amend")
        if fixed := sorted(path for path in changes if path.split(".")[0] not in AMENDABLE):
            raise ValueError(
                f"votes are in, and these can no longer change: {', '.join(fixed)}. An amendment may change "
                f"{', '.join(AMENDABLE)}; begin another study (another `folder`) for the rest"
            )
        _check_form(latest, study)
        at = database.clock()
        _add_people(connection, study)
        _add_version(connection, at, study, latest.version + 1, reason.strip(), frozen_at=at)
        body = {"version": latest.version + 1, "hash": study.hash, "reason": reason.strip(), "changes": changes}
        audit.write(connection, at, audit.COORDINATOR, "amend", body)
        found = _latest(connection)
        assert found is not None
        return found, changes


def check_current(connection: sqlite3.Connection, study: Study) -> Version:
    """The latest version, which is the study's.

    Raises:
        Refused: when the record holds another protocol by now than this server was started with.
    """
    latest = _latest(connection)
    if latest is None or latest.hash != study.hash:
        raise Refused(
            "The study was changed while this server ran. Tell the coordinator to start the server again.", 503
        )
    return latest


def freeze(connection: sqlite3.Connection, at: float, version: Version) -> None:
    """The first vote freezes the version under which it is given. Within the caller's transaction."""
    if version.frozen_at is None:
        connection.execute("UPDATE protocol SET frozen_at = ? WHERE version = ?", (at, version.version))
        audit.write(connection, at, audit.COORDINATOR, "freeze", {"version": version.version, "hash": version.hash})


def versions(database: Database) -> list[Version]:
    """Every version, the oldest first."""
    with database.reading() as connection:
        return [_version(row) for row in connection.execute("SELECT * FROM protocol ORDER BY version")]


def places(database: Database) -> dict[str, list[Place]]:
    """Person -> what the person is given to read, in order."""
    found: dict[str, list[Place]] = {}
    with database.reading() as connection:
        for row in connection.execute("SELECT * FROM place ORDER BY person, position"):
            found.setdefault(row["person"], []).append(place(row))
    return found


def place(row: Row) -> Place:
    return Place(row["position"], row["purpose"], row["item"], tuple(json.loads(row["shown"])))


def add_place(connection: sqlite3.Connection, person: str, new: Place) -> None:
    connection.execute(
        "INSERT INTO place VALUES (?, ?, ?, ?, ?)",
        (person, new.position, new.purpose, new.case, json.dumps(new.shown)),
    )


def _replace(connection: sqlite3.Connection, at: float, study: Study, latest: Version | None) -> None:
    for table in ("protocol", "place", "vote"):  # pages that were opened; nothing was entered in them
        connection.execute(f"DELETE FROM {table}")
    known = tuple(study.protocol.people)
    marks = ", ".join("?" * len(known))
    for table, column in (("person", "name"), ("invitation", "person"), ("session", "person")):
        connection.execute(f"DELETE FROM {table} WHERE {column} NOT IN ({marks})", known)
    _add_people(connection, study)
    _add_version(connection, at, study, 1, None, frozen_at=None)
    body = {"hash": study.hash} | ({"before": latest.hash} if latest else {})
    audit.write(connection, at, audit.COORDINATOR, "protocol", body)


def _add_people(connection: sqlite3.Connection, study: Study) -> None:
    """People who are new, with their pages."""
    assigned = assign(study)
    for name, role in study.protocol.people.items():
        left = study.protocol.replacements.get(name)
        if (
            left
            and not connection.execute("SELECT 1 FROM person WHERE name = ? AND withdrawn_at > 0", (left,)).fetchone()
        ):
            raise ValueError(
                f"replacements: {left} has not been withdrawn; first `vlmalign review withdraw STUDY {left}`"
            )
        connection.execute(
            "INSERT INTO person (name, role) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET role = excluded.role",
            (name, role),
        )
        if not connection.execute("SELECT 1 FROM place WHERE person = ?", (name,)).fetchone():
            for new in assigned.get(name, []):
                add_place(connection, name, new)


def _add_version(
    connection: sqlite3.Connection,
    at: float,
    study: Study,
    version: int,
    reason: str | None,
    *,
    frozen_at: float | None,
) -> None:
    settings, contents = audit.canonical(study.settings), audit.canonical(study.material.contents)
    connection.execute(
        "INSERT INTO protocol VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (version, study.hash, settings, contents, dump_config(study.protocol), at, reason, frozen_at),
    )


def _latest(connection: sqlite3.Connection) -> Version | None:
    row = connection.execute("SELECT * FROM protocol ORDER BY version DESC LIMIT 1").fetchone()
    return None if row is None else _version(row)


def _version(row: Row) -> Version:
    fields: dict[str, Any] = dict(row)
    return Version(**{**fields, "settings": json.loads(row["settings"]), "contents": json.loads(row["contents"])})


def _changes(latest: Version, study: Study) -> dict[str, tuple[Any, Any]]:
    # Through JSON, as the record keeps it: a tuple has become a list.
    now = json.loads(audit.canonical({**study.settings, "shown": study.material.contents}))
    return differences({**latest.settings, "shown": latest.contents}, now)


def _check_form(latest: Version, study: Study) -> None:
    """Raises ValueError when what was answered before could not be read with the new form: words may change and questions
    be added, but no question or step may go.
    """
    before, now = Protocol.model_validate_json(json.dumps(read_yaml(latest.text))).form, study.protocol.form
    lost = [
        name
        for name in ("preference", "harm", "verdict", "comment")
        if getattr(before, name) and not getattr(now, name)
    ]
    lost += [name for name in ("criteria", "tags") if set(getattr(before, name)) - set(getattr(now, name))]
    steps = ("confidence", "scale", "harm_extent", "harm_likelihood")
    lost += [name for name in steps if len(getattr(before, name)) != len(getattr(now, name))]
    if lost:
        raise ValueError(
            f"form: votes that are in would lose their meaning by the change of {', '.join(lost)}. An amendment may change words "
            "and add criteria or tags; begin another study for the rest"
        )


def _told(changes: Mapping[str, tuple[Any, Any]]) -> str:
    told = [
        f"{path} (the content that is shown)" if path.startswith("shown.") else f"{path} ({before!r} -> {after!r})"
        for path, (before, after) in changes.items()
    ]
    return "; ".join(text if len(text) <= 160 else text[:157] + "..." for text in told)
