"""An analysis whole, as one record: what `analysis.json` holds and the page shows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmalign.review.analysis.accuracy import read_accuracy
from vlmalign.review.analysis.agreement import alpha, consistency, icc, pairwise_kappa
from vlmalign.review.analysis.ballots import Ballot, Gathered, gather
from vlmalign.review.analysis.models import PREFERENCE, average_tests, preference_models, rating_models
from vlmalign.review.analysis.pairs import pairs
from vlmalign.review.analysis.preferences import arm_shares
from vlmalign.review.analysis.resampling import DRAWS
from vlmalign.review.analysis.sandwich import FEWEST_READERS
from vlmalign.review.database import Database
from vlmalign.review.export import blinding, frozen, guess_rows
from vlmalign.review.flow import counted
from vlmalign.review.material import Study
from vlmalign.review.outcomes import Vote, votes

Row = dict[str, Any]


def analyse(
    database: Database, study: Study, *, scores: Path | None = None, score: str | None = None, draws: int = DRAWS
) -> Row:
    """Everything that is said of a study. Resampling follows from the protocol's seed: the same votes give the same numbers.

    Raises:
        ValueError: for a protocol that is not the frozen one, without a closed page, or for scores that fit no arm.
    """
    if draws < 200:
        raise ValueError(f"draws must be at least 200 for the ends of an interval, found {draws}")
    with database.snapshot():
        version = frozen(database, study)
        found, flow = votes(database), counted(database, study)
    gathered = gather(study, found)
    compared = pairs(gathered.ballots, gathered.arms, gathered.style)
    seed = study.protocol.seed
    shares, rates = [], []
    if gathered.ballots:
        shares, rates = arm_shares(gathered.ballots, compared, gathered.arms, draws=draws, seed=seed)
    accuracy = None if scores is None else read_accuracy(scores, study.protocol, score)
    guesses = [row for vote in found if vote.kept and vote.closed_at is not None for row in guess_rows(study, vote)]
    return {
        "title": study.protocol.title,
        "simulated": study.protocol.simulated,
        "hash": study.hash,
        "protocol_version": version.version,
        "flow": flow,
        "pages": dict(gathered.counts),
        "left_out": [{"case": case, "reason": reason} for case, reason in study.material.left_out],
        "arms": list(gathered.arms),
        "readers": len(gathered.readers),
        "cases": len(gathered.cases),
        "ballots": len(gathered.ballots),
        "ratings": len(gathered.ratings),
        "fewest_readers": FEWEST_READERS,
        "draws": draws,
        "shares": [row._asdict() | _intervals(row) for row in shares],
        "rates": [row._asdict() | _intervals(row) for row in rates],
        "preference": preference_models(gathered, compared) if gathered.ballots else [],
        "ordinal": rating_models(gathered),
        "tests": average_tests(gathered, compared),
        "agreement": _agreement(gathered, draws, seed),
        "consistency": _consistency(gathered),
        "attention": _attention(study, found),
        "blinding": blinding(study, guesses),
        "accuracy": None if accuracy is None else {"name": accuracy.name, "arms": dict(accuracy.arms)},
    }


def _intervals(row: Any) -> Row:
    return {name: value._asdict() for name, value in row._asdict().items() if hasattr(value, "_asdict")}


def _agreement(gathered: Gathered, draws: int, seed: int) -> list[Row]:
    found = []
    by_case: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for ballot in gathered.ballots:
        by_case[ballot.case, PREFERENCE][ballot.reader] = ballot.value(gathered.arms)
    if by_case:
        values = Ballot.values(gathered.arms)
        found.append(
            {
                "outcome": PREFERENCE,
                "level": "nominal",
                "alpha": alpha(by_case, values, "nominal", draws=draws, seed=seed)._asdict(),
                "kappa": pairwise_kappa(by_case, values, weights=None)._asdict(),
                "icc": None,
            }
        )
    for outcome in gathered.outcomes:
        said: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)
        for rating in gathered.ratings:
            if outcome.key in rating.levels:
                said[rating.case, rating.arm][rating.reader] = rating.levels[outcome.key]
        found.append(
            {
                "outcome": outcome.key,
                "level": "ordinal",
                "alpha": alpha(said, outcome.levels, "ordinal", draws=draws, seed=seed)._asdict(),
                "kappa": pairwise_kappa(said, outcome.levels)._asdict(),
                "icc": icc(said),
            }
        )
    return found


def _consistency(gathered: Gathered) -> Mapping[str, list[Row]]:
    """Outcome -> each reader, and all together last; outcomes without a repetition are not in it."""
    arms = gathered.arms
    preferred = [(first.reader, first.value(arms), again.value(arms)) for first, again in gathered.repeated]
    found = {PREFERENCE: consistency(preferred, Ballot.values(arms))}
    for outcome in gathered.outcomes:
        key = outcome.key
        levels = [
            (first.reader, first.levels[key], again.levels[key])
            for first, again in gathered.rated_again
            if key in first.levels and key in again.levels
        ]
        found[key] = consistency(levels, outcome.levels, weights="quadratic")
    return {name: [row._asdict() for row in rows] for name, rows in found.items() if rows}


def _attention(study: Study, found: Sequence[Vote]) -> dict[str, dict[str, int]]:
    """Reader -> attention cases read, and those on which the better answer was preferred."""
    counts: dict[str, dict[str, int]] = {}
    for vote in found:
        if (
            vote.place.purpose == "attention"
            and vote.kept
            and vote.closed_at is not None
            and vote.preferred is not None
        ):
            own = counts.setdefault(vote.person, {"read": 0, "right": 0})
            own["read"] += 1
            own["right"] += vote.preferred == study.material.known[vote.place.case].expected
    return counts
