"""What a study is and how far it is, counted: for the terminal, and for the flow chart of a paper."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vlmalign.review import audit
from vlmalign.review.assignment import assign
from vlmalign.review.blocks import shared_cases
from vlmalign.review.database import Database
from vlmalign.review.freezing import places, versions
from vlmalign.review.material import Study
from vlmalign.review.outcomes import Vote, votes

#: milliseconds by which a browser's stopwatch may be ahead of the server's clock before it is counted as wrong
TOLERANCE_MS = 5000


def described(study: Study) -> list[str]:
    """The study before it begins: what it shows to whom, and what a coordinator should look at."""
    protocol, material = study.protocol, study.material
    assigned = assign(study)
    sizes = [sum(place.purpose == "case" for place in pages) for pages in assigned.values()]
    pages = [len(own) for own in assigned.values()]
    order = list(protocol.readers)
    read = Counter(place.case for own in order for place in assigned[own] if place.purpose == "case")
    blocks = [
        tuple(
            i for i, reader in enumerate(order) if any(p.purpose == "case" and p.case == case for p in assigned[reader])
        )
        for case in read
    ]
    shared = shared_cases(blocks, len(order)).values() if len(order) > 1 else ()
    combos = Counter(tuple(sorted(place.shown)) for own in order for place in assigned[own] if place.purpose == "case")
    lines = [
        f"{protocol.title}{' (simulated)' if protocol.simulated else ''}",
        f"  cases      {len(material.cases)}, each read by {protocol.design.readers_per_case} of {len(order)} readers",
        f"  a reader   {_range(sizes)} cases, {_range(pages)} pages with repetitions, attention cases and last questions",
        *([f"  overlap    every two readers share {_range(shared)} cases"] if shared else []),
        f"  arms       {len(material.slots)}, {protocol.design.answers} at a time; each combination is shown {_range(combos.values())} times",
        f"  hash       {study.hash}",
    ]
    return lines + [f"note: {note}" for note in material.notes]


def counted(database: Database, study: Study) -> dict[str, Any]:
    """The flow of cases, people and pages, from what was planned to what can be analysed."""
    found, given, log = votes(database), places(database), audit.events(database)
    with database.reading() as connection:
        people = connection.execute("SELECT * FROM person ORDER BY name").fetchall()
    gone = {row["name"]: bool(row["votes_kept"]) for row in people if row["withdrawn_at"] is not None}
    closed = [vote for vote in found if vote.closed_at is not None]
    counts = {
        "cases": {"shown": len(study.material.cases), "left_out": len(study.material.left_out)},
        "people": {
            "readers": sum(row["role"] == "reader" for row in people),
            "adjudicators": sum(row["role"] == "adjudicator" for row in people),
            "begun": sum(row["begun_at"] is not None for row in people),
            "withdrawn_votes_kept": sum(gone.values()),
            "withdrawn_votes_left_out": len(gone) - sum(gone.values()),
        },
        "pages": {
            "given": sum(map(len, given.values())),
            "opened": len(found),
            "closed": len(closed),
            "closed_by_purpose": dict(sorted(Counter(vote.place.purpose for vote in closed).items())),
            "closed_of_withdrawn": sum(vote.withdrawn for vote in closed),
            "left_out_with_withdrawn": sum(not vote.kept for vote in closed),
        },
        "preferences": dict(
            sorted(
                Counter(
                    "an answer" if isinstance(vote.preferred, int) else vote.preferred
                    for vote in _main(closed)
                    if vote.preferred is not None
                ).items()
            )
        ),
        "clock": {
            "set_back": audit.backward_steps(log),
            "stopwatch_ahead": sum(stopwatch_ahead(vote) for vote in closed),
            "closed_before_opened": sum(_elapsed(vote) < 0 for vote in closed),
        },
        "protocol": {
            "versions": len(versions(database)),
            "frozen": any(v.frozen_at is not None for v in versions(database)),
        },
        "audit": {"events": len(log), "chain": log[-1].chain if log else audit.START},
    }
    return counts


def progress(database: Database, study: Study) -> list[str]:
    """How far everyone is."""
    counts, given = counted(database, study), places(database)
    closed = Counter(vote.person for vote in votes(database) if vote.closed_at is not None)
    with database.reading() as connection:
        people = connection.execute("SELECT * FROM person ORDER BY role DESC, name").fetchall()
    lines = [f"{study.protocol.title}{' (simulated)' if study.protocol.simulated else ''}"]
    for row in people:
        state = "withdrawn" if row["withdrawn_at"] else "begun" if row["begun_at"] else "not begun"
        lines.append(
            f"  {row['name']:<16} {row['role']:<12} {closed[row['name']]:>4} of {len(given.get(row['name'], [])):>4} pages closed  {state}"
        )
    clock = counts["clock"]
    if any(clock.values()):
        lines.append(
            f"note: the server's clock was set back {clock['set_back']} times; {clock['stopwatch_ahead']} pages have a browser's "
            f"stopwatch ahead of it, {clock['closed_before_opened']} were closed before they were opened; times of those are marked"
        )
    if counts["protocol"]["frozen"] and versions(database)[-1].hash != study.hash:
        lines.append("note: the protocol file differs from the frozen one; `vlmalign review amend` records a change")
    lines.append(f"  audit log  {counts['audit']['events']} events, unbroken, {counts['audit']['chain'][:16]}...")
    return lines


def stopwatch_ahead(vote: Vote) -> bool:
    """Whether the browser counts more time than passed on the server: one of the clocks is wrong."""
    return vote.active_ms > _elapsed(vote) * 1000 + TOLERANCE_MS


def _elapsed(vote: Vote) -> float:
    """Seconds that a closed page was open."""
    assert vote.closed_at is not None
    return vote.closed_at - vote.opened_at


def _main(found: list[Vote]) -> list[Vote]:
    return [vote for vote in found if vote.place.purpose == "case" and vote.kept]


def _range(values: Any) -> str:
    values = list(values)
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"
