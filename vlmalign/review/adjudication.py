"""Cases on which readers disagree go to the adjudicators, who see the answers as blinded as readers do, and the readers' votes.

A case is ready when everyone who was given it has closed it or was withdrawn. Readers disagree when they do not all prefer the
same, or, in a study of verdicts, do not all give the same verdict on an answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vlmalign.review import audit
from vlmalign.review.assignment import Place
from vlmalign.review.database import Database
from vlmalign.review.freezing import add_place, places
from vlmalign.review.material import Study
from vlmalign.review.outcomes import Vote, votes
from vlmalign.review.seeded import shuffled


class Opinion(NamedTuple):
    """One reader's vote, with the letters of the adjudicator's page."""

    order: tuple[str, ...]  #: in which the reader saw the answers: a comment's letters are the reader's
    preference: str | None
    confidence: int | None
    verdicts: Mapping[str, str]
    comment: str


def hand_over(database: Database, study: Study, adjudicator: str) -> None:
    """Add the cases that have become ready to the adjudicator's pages. What was given before keeps its place."""
    given = places(database)
    known = {own.case for own in given.get(adjudicator, [])}
    new = [case for case in disagreements(database, given) if case not in known]
    if not new:
        return
    seed = study.protocol.seed
    with database.transaction() as connection:
        # Read again where nobody else writes: two windows of the adjudicator may ask at once.
        rows = connection.execute("SELECT item FROM place WHERE person = ?", (adjudicator,)).fetchall()
        there = {row["item"] for row in rows}
        for number, case in enumerate(shuffled(set(new) - there, seed, "order", adjudicator), start=len(rows) + 1):
            combo = next(own.shown for pages in given.values() for own in pages if own.case == case)
            shown = tuple(shuffled(combo, seed, "sides", adjudicator, case))
            add_place(connection, adjudicator, Place(number, "adjudication", case, shown))
            at = database.clock()
            audit.write(connection, at, audit.COORDINATOR, "hand over", {"person": adjudicator}, position=number)


def disagreements(database: Database, given: Mapping[str, Sequence[Place]]) -> list[str]:
    """The cases that are ready and on which readers disagree, by id."""
    by_case: dict[str, list[Vote]] = defaultdict(list)
    for vote in votes(database):
        if vote.place.purpose == "case" and vote.closed_at is not None and vote.kept:
            by_case[vote.place.case].append(vote)
    with database.reading() as connection:
        gone = {row["name"] for row in connection.execute("SELECT name FROM person WHERE withdrawn_at IS NOT NULL")}
    due: dict[str, set[str]] = defaultdict(set)
    for person, pages in given.items():
        for own in pages:
            if own.purpose == "case" and person not in gone:
                due[own.case].add(person)
    return sorted(
        case
        for case, own in by_case.items()
        if due[case] <= {vote.person for vote in own} and len({_said(vote) for vote in own}) > 1
    )


def _said(vote: Vote) -> tuple[object, ...]:
    if vote.preferred is not None:
        return (vote.preferred,)
    return tuple(sorted((slot, said.get("verdict", "")) for slot, said in vote.by_slot().items()))


def opinions(database: Database, own: Place) -> list[Opinion]:
    """The readers' votes on an adjudicator's case, in an order that does not tell who they are."""
    letters = dict(zip(own.shown, own.letters, strict=True))
    found = []
    for vote in votes(database):
        if vote.place.purpose == "case" and vote.place.case == own.case and vote.closed_at is not None and vote.kept:
            preferred = vote.preferred
            found.append(
                Opinion(
                    tuple(letters[slot] for slot in vote.place.shown),
                    letters[preferred] if isinstance(preferred, int) else preferred,
                    vote.entry.get("confidence"),
                    {letters[slot]: said["verdict"] for slot, said in vote.by_slot().items() if "verdict" in said},
                    vote.entry.get("comment", ""),
                )
            )
    return shuffled(found, "opinions", own.case)
