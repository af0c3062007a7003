"""The record of a reader study: one SQLite file in WAL mode, whose commits are on disk before anybody is told of them.

Two things are kept. `event` holds all that ever happened, in order, and is never changed: triggers refuse it, and every row
holds the SHA-256 of the row before it (audit.py). The other tables hold what follows from the events, for quick reading, and
are written in the same transaction.
"""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock

from vlmalign.review.refusal import Refused

FILE = "reader_study.sqlite"
APPLICATION = 0x766C6D72  #: `application_id` of our files: "vlmr"
VERSION = 1  #: of the schema; raised when a table changes
FULL_SYNC = 2  #: SQLite's number for synchronous=FULL
BUSY_SECONDS = 20.0

#: file systems on which SQLite's locks or the shared memory of its WAL cannot be trusted (sqlite.org/wal.html)
NETWORK = (
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "beegfs",
    "gpfs",
    "ncpfs",
)
MOUNTS = Path("/proc/self/mountinfo")

SCHEMA = """
CREATE TABLE event (
  seq INTEGER PRIMARY KEY, at REAL NOT NULL, actor TEXT NOT NULL, kind TEXT NOT NULL, position INTEGER,
  body TEXT NOT NULL, key TEXT, chain TEXT NOT NULL, UNIQUE (actor, key));
CREATE INDEX event_of_page ON event (actor, position);
CREATE TRIGGER event_stays BEFORE UPDATE ON event BEGIN SELECT RAISE(ABORT, 'events are never changed'); END;
CREATE TRIGGER event_is_kept BEFORE DELETE ON event BEGIN SELECT RAISE(ABORT, 'events are never deleted'); END;
CREATE TABLE protocol (
  version INTEGER PRIMARY KEY, hash TEXT NOT NULL, settings TEXT NOT NULL, contents TEXT NOT NULL, text TEXT NOT NULL,
  at REAL NOT NULL, reason TEXT, frozen_at REAL);
CREATE TABLE person (
  name TEXT PRIMARY KEY, role TEXT NOT NULL, begun_at REAL, withdrawn_at REAL, votes_kept INTEGER);
CREATE TABLE invitation (hash BLOB PRIMARY KEY, person TEXT NOT NULL, expires REAL NOT NULL, used_at REAL);
CREATE TABLE session (hash BLOB PRIMARY KEY, person TEXT NOT NULL, expires REAL NOT NULL);
CREATE TABLE place (
  person TEXT NOT NULL, position INTEGER NOT NULL, purpose TEXT NOT NULL, item TEXT NOT NULL, shown TEXT NOT NULL,
  PRIMARY KEY (person, position)) WITHOUT ROWID;
CREATE TABLE vote (
  person TEXT NOT NULL, position INTEGER NOT NULL, opened_at REAL NOT NULL, closed_at REAL, revision INTEGER NOT NULL,
  active_ms INTEGER NOT NULL, protocol INTEGER, body TEXT NOT NULL, PRIMARY KEY (person, position)) WITHOUT ROWID;
"""

log = logging.getLogger("vlmalign.review")


class Database:
    """One connection, used by one thread at a time; other processes may have the file open as well."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]):
        self._connection, self._lock = connection, RLock()
        self.clock = clock

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All of it is on disk once the block has ended, or none of it is.

        Raises:
            Refused: with a sentence for the reader, when the disk takes no more or another process holds the file.
        """
        with self._lock:
            try:
                self._connection.execute("BEGIN IMMEDIATE")
                try:
                    yield self._connection
                    self._connection.execute("COMMIT")
                except BaseException:
                    if self._connection.in_transaction:
                        self._connection.execute("ROLLBACK")
                    raise
            except sqlite3.OperationalError as error:
                raise _refusal(error) from error

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            yield self._connection

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All reading within sees the record at one moment, whatever a server writes meanwhile."""
        with self._lock:
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                self._connection.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            self._connection.close()


def open_database(folder: Path, *, create: bool = True, clock: Callable[[], float] = time.time) -> Database:
    """The record in `folder`, new if there is none.

    Raises:
        ValueError: for a folder on a network file system, a file of a newer version or of something else, or settings that
            SQLite does not take; without `create`, if there is no file.
    """
    path = folder / FILE
    if not create and not path.is_file():
        raise ValueError(f"no reader study in {folder}: expected {FILE}; `vlmalign review invite` begins one")
    folder.mkdir(parents=True, exist_ok=True)
    if (kind := file_system(folder)) in NETWORK or kind.startswith("fuse.ssh"):
        raise ValueError(
            f"{folder} is on a network file system ({kind}), where SQLite's locks do not hold and votes could be lost; set "
            "`folder` to a disk of this machine"
        )
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    connection.row_factory = sqlite3.Row
    try:
        _check_version(connection, path)
        mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
        connection.execute("PRAGMA synchronous = FULL")
        sync = connection.execute("PRAGMA synchronous").fetchone()[0]
        if mode != "wal" or sync != FULL_SYNC:
            raise ValueError(f"{path}: SQLite gives journal mode {mode!r} and synchronous {sync}, not WAL and FULL")
        _make_schema(connection)
    except sqlite3.DatabaseError as error:
        connection.close()
        raise ValueError(f"{path}: {error}; restore the file from a copy") from error
    except ValueError:
        connection.close()
        raise
    return Database(connection, clock)


def _check_version(connection: sqlite3.Connection, path: Path) -> None:
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if tables and application != APPLICATION:
        raise ValueError(f"{path} is a database, but not of a reader study; choose another folder")
    if version > VERSION:
        raise ValueError(
            f"{path} was written by a newer version of vlmalign (format {version}; this one knows {VERSION}); use that version"
        )


def _make_schema(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")  # of two first starts, the second finds what the first made
    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
        for statement in _statements(SCHEMA):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {VERSION}")
    connection.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    """Whole statements of a script; a trigger has semicolons within."""
    part = ""
    for piece in script.split(";"):
        part += piece + ";"
        if sqlite3.complete_statement(part):
            if part.strip(" \n;"):
                yield part
            part = ""


def _refusal(error: sqlite3.OperationalError) -> Refused:
    name = getattr(error, "sqlite_errorname", "") or ""
    log.error("the record could not be written: %s (%s)", error, name)
    if name.startswith("SQLITE_FULL") or name.startswith("SQLITE_IOERR"):
        return Refused(
            "Not saved: the server's disk is full or fails. Your entries are still on this page; tell the study's "
            "coordinator and leave the page open.",
            507,
        )
    if name.startswith("SQLITE_BUSY") or name.startswith("SQLITE_LOCKED"):
        return Refused("Not saved: the record is busy. It will be tried again.", 503)
    if name.startswith("SQLITE_READONLY"):
        return Refused("Not saved: the record cannot be written. Tell the study's coordinator.", 507)
    raise error


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """The type of the file system that holds `path`, as the kernel names it; "" where it does not say."""
    if not mounts.is_file():
        return ""
    where, best, kind = path.resolve(), "", ""
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")  # a blank is written \040
        if where.is_relative_to(point) and len(point) >= len(best):  # of two at one point, the later one is seen
            best, kind = point, after.split()[0]
    return kind
