"""Closed votes with their letters turned back into slots: what was preferred, whoever stood on which side."""

from __future__ import annotations

import json
from dataclasses import dataclass

from vlmalign.review.assignment import Place
from vlmalign.review.database import Database
from vlmalign.review.form import NONE, TIE, Entry
from vlmalign.review.freezing import place


@dataclass(frozen=True)
class Vote:
    person: str
    role: str
    place: Place
    entry: Entry
    opened_at: float
    closed_at: float | None  #: None while the page is open
    active_ms: int
    revision: int
    protocol: int | None  #: version under which it was given
    withdrawn: bool
    kept: bool  #: False for votes of a person who withdrew together with them

    @property
    def preferred(self) -> int | str | None:
        """The slot (of an attention case: the number of its answer), "tie", "none", or None where nothing was chosen."""
        choice = self.entry.get("preference")
        return choice if choice in (None, TIE, NONE) else self.place.shown[self.place.letters.index(choice)]

    def by_slot(self) -> dict[int, Entry]:
        """What was said of each answer."""
        pairs = zip(self.place.letters, self.place.shown, strict=True)
        return {slot: self.entry["answers"].get(letter, {}) for letter, slot in pairs}


def votes(database: Database) -> list[Vote]:
    """Every page that was opened, of everyone, in order of person and page."""
    with database.reading() as connection:
        rows = connection.execute(
            "SELECT v.*, p.purpose, p.item, p.shown, n.role, n.withdrawn_at, n.votes_kept FROM vote v"
            " JOIN place p ON p.person = v.person AND p.position = v.position JOIN person n ON n.name = v.person"
            " ORDER BY v.person, v.position"
        ).fetchall()
    return [
        Vote(
            row["person"],
            row["role"],
            place(row),
            json.loads(row["body"]),
            row["opened_at"],
            row["closed_at"],
            row["active_ms"],
            row["revision"],
            row["protocol"],
            row["withdrawn_at"] is not None,
            row["withdrawn_at"] is None or bool(row["votes_kept"]),
        )
        for row in rows
    ]
