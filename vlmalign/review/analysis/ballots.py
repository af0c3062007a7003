"""What is analysed: every closed page as a ballot and its ratings, by the names of the arms, and a count of what is not.

in the analysis    closed pages of purpose "case", of readers; of withdrawn readers where they agreed that votes are kept
kept apart         repetitions (a reader's consistency), attention cases, last questions, adjudications
left out           pages that were opened and not closed, votes left out with a withdrawn reader
no ballot          pages on which two of the answers are the same text: a preference among them says nothing of the arms
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlmalign.review.form import NONE, TIE
from vlmalign.review.material import Study
from vlmalign.review.outcomes import Vote
from vlmalign.review.protocol import Form
from vlmalign.review.rendering import form_counts

Style = Mapping[tuple[str, str], tuple[int, int]]


@dataclass(frozen=True)
class Ballot:
    """A preference on one page."""

    reader: str
    case: str
    shown: tuple[str, ...]  #: arms, in the order in which the reader saw them
    choice: int | str  #: index into `shown`, "tie" or "none" (none is acceptable)
    own: bool = False  #: one of the answers is the reader's own

    @property
    def winner(self) -> str | None:
        """The arm that was preferred."""
        return self.shown[self.choice] if isinstance(self.choice, int) else None

    def value(self, arms: Sequence[str]) -> int:
        """What was chosen, whoever stood on which side, as a number: the arm's, then tie, then none."""
        return (*arms, None).index(self.winner) + (self.choice == NONE)

    @staticmethod
    def values(arms: Sequence[str]) -> int:
        return len(arms) + 2


@dataclass(frozen=True)
class Rating:
    """What was said of one answer on one page."""

    reader: str
    case: str
    arm: str
    side: int  #: 0 for the answer shown first
    levels: Mapping[str, int]  #: outcome -> level, from 0


@dataclass(frozen=True)
class Outcome:
    """An ordinal question of the form."""

    key: str
    words: str
    levels: int
    higher_is_better: bool


@dataclass(frozen=True)
class Gathered:
    arms: tuple[str, ...]  #: in the order of the protocol; the first is the reference
    ballots: Sequence[Ballot]
    ratings: Sequence[Rating]
    outcomes: Sequence[Outcome]
    style: Style  #: (case, arm) -> words and formatting marks of the answer as it was shown
    repeated: Sequence[tuple[Ballot, Ballot]]  #: first and second ballot of a reader on the same case
    rated_again: Sequence[tuple[Rating, Rating]]
    counts: Mapping[str, int]  #: of pages: in the analysis, kept apart, left out

    @property
    def readers(self) -> list[str]:
        return sorted({each.reader for each in (*self.ballots, *self.ratings)})

    @property
    def cases(self) -> list[str]:
        return sorted({each.case for each in (*self.ballots, *self.ratings)})


def gather(study: Study, votes: Sequence[Vote]) -> Gathered:
    """The ballots and ratings of a study.

    Raises:
        ValueError: without a closed page to analyse, or where the form asks neither preferences nor ratings.
    """
    counts: Counter[str] = Counter()
    pages: dict[str, dict[tuple[str, str], Vote]] = {"case": {}, "repeat": {}}
    for vote in votes:
        purpose = vote.place.purpose
        if not vote.kept:
            counts["left out with a withdrawn person"] += 1
        elif vote.closed_at is None:
            counts["opened, not closed"] += 1
        elif purpose in pages:
            counts["analysed" if purpose == "case" else "repetitions"] += 1
            pages[purpose][vote.person, vote.place.case] = vote
        else:
            counts[{"attention": "attention cases", "guess": "last questions"}.get(purpose, "adjudications")] += 1
    if not pages["case"]:
        raise ValueError(
            "expected closed pages to analyse, found none; `vlmalign review status` says how far readers are"
        )
    outcomes = _outcomes(study.protocol.form)
    ballots = [ballot for vote in pages["case"].values() if (ballot := _ballot(study, vote, counts)) is not None]
    ratings = {key: _ratings(study, vote, outcomes) for key, vote in pages["case"].items()}
    if not ballots and not any(ratings.values()):
        raise ValueError(
            "expected preferences, criteria or harm to analyse, found none in the closed pages; the export has the rest"
        )
    repeated, rated_again = [], []
    for key, vote in pages["repeat"].items():
        if key not in pages["case"]:
            counts["repetitions without a first page"] += 1
            continue
        pair = _ballot(study, pages["case"][key]), _ballot(study, vote)
        if pair[0] is not None and pair[1] is not None:
            repeated.append(pair)
        before = {rating.arm: rating for rating in ratings[key]}
        rated_again += [(before[again.arm], again) for again in _ratings(study, vote, outcomes)]
    style = {}
    for slot in study.material.slots:
        for case, answer in slot.answers.items():
            form = form_counts(answer.text)
            style[case, slot.name] = (form["words"], sum(form.values()) - form["words"])
    return Gathered(
        tuple(study.protocol.arms),
        ballots,
        [rating for own in ratings.values() for rating in own],
        outcomes,
        style,
        repeated,
        rated_again,
        dict(counts),
    )


def _outcomes(form: Form) -> list[Outcome]:
    found = [Outcome(key, words, len(form.scale), True) for key, words in form.criteria.items()]
    if form.harm:
        found.append(Outcome("harm_extent", "Extent of harm", len(form.harm_extent), False))
        found.append(Outcome("harm_likelihood", "Likelihood of harm", len(form.harm_likelihood), False))
    return found


def _ballot(study: Study, vote: Vote, counts: Counter[str] | None = None) -> Ballot | None:
    preferred, place = vote.preferred, vote.place
    if preferred is None:
        return None
    if len({study.material.answer(place.case, slot).text for slot in place.shown}) < len(place.shown):
        if counts is not None:
            counts["identical answers, no ballot"] += 1
        return None
    choice = preferred if preferred in (TIE, NONE) else place.shown.index(preferred)
    own = any(study.material.answer(place.case, slot).author == vote.person for slot in place.shown)
    return Ballot(vote.person, place.case, _names(study, vote), choice, own)


def _ratings(study: Study, vote: Vote, outcomes: Sequence[Outcome]) -> list[Rating]:
    found = []
    said = vote.by_slot()
    for side, (slot, arm) in enumerate(zip(vote.place.shown, _names(study, vote), strict=True)):
        given = said[slot].get("criteria", {}) | said[slot]
        levels = {each.key: given[each.key] for each in outcomes if each.key in given}
        if levels:
            found.append(Rating(vote.person, vote.place.case, arm, side, levels))
    return found


def _names(study: Study, vote: Vote) -> tuple[str, ...]:
    return tuple(study.material.slots[slot].name for slot in vote.place.shown)
