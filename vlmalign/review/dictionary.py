"""The columns of an export, each with its type and meaning: the data dictionary, and the order in which files hold them."""

from __future__ import annotations

from typing import NamedTuple

from vlmalign.review.protocol import Protocol


class Column(NamedTuple):
    name: str
    type: str
    meaning: str


_WHO = (
    Column("person", "text", "pseudonym of the reader or adjudicator"),
    Column("role", "text", "reader or adjudicator"),
    Column("position", "whole number", "page number in the person's order, from 1"),
    Column("purpose", "text", "case; repeat (seen a second time, sides reversed); attention; adjudication"),
    Column("case", "text", "id of the case"),
)


def comparisons(protocol: Protocol) -> list[Column]:
    """Of `comparisons`: one row for each page that was opened."""
    letters = "ABCDEF"[: protocol.design.answers]
    return [
        *_WHO,
        *(
            Column(f"arm_{letter}", "text", f"arm shown as answer {letter}; empty in attention cases")
            for letter in letters
        ),
        Column("state", "text", "closed, or open (saved and not closed: no vote)"),
        Column("withdrawn", "0 or 1", "the person was withdrawn, and agreed that the votes are kept"),
        Column(
            "preferred",
            "text",
            "arm that was preferred; tie: no difference; none: none is acceptable; empty: not asked or not yet given",
        ),
        Column("preferred_letter", "text", "what was clicked: A, B, ..., tie, none"),
        Column("confidence", "whole number", f"from 1: {_steps(protocol.form.confidence)}"),
        Column("expected_letter", "text", "attention cases: the better answer"),
        Column("attentive", "0 or 1", "attention cases: the better answer was preferred"),
        Column("identical", "0 or 1", "two of the answers shown are the same text"),
        Column(
            "comment",
            "text",
            "comment; in CSV an apostrophe stands before = + - @ at the start, so that no spreadsheet runs it",
        ),
        Column("opened_at", "time", "when the page was first shown, by the server's clock (UTC)"),
        Column("closed_at", "time", "when it was closed"),
        Column("elapsed_s", "seconds", "from opening to closing, pauses included"),
        Column("active_s", "seconds", "for how long the page was in view, by the browser's stopwatch"),
        Column("clock_wrong", "0 or 1", "the two times contradict each other: a clock was set, use neither"),
        Column("revisions", "whole number", "saves and undos before it was closed, itself included"),
        Column("protocol_version", "whole number", "version of the protocol under which it was given"),
    ]


def ratings(protocol: Protocol) -> list[Column]:
    """Of `ratings`: one row for each answer on each page that was opened, guesses apart."""
    form = protocol.form
    return [
        *_WHO,
        Column("letter", "text", "as which answer it was shown: its side"),
        Column("arm", "text", "arm that gave the answer; empty in attention cases"),
        Column("author", "text", "reader who wrote the answer, of an arm of readers' own decisions"),
        Column("own", "0 or 1", "the person judges an answer of their own"),
        *(
            Column(key, "whole number", f"{words}, from 1: {_steps(form.scale)}")
            for key, words in form.criteria.items()
        ),
        *(
            [
                Column("harm_extent", "whole number", f"from 1: {_steps(form.harm_extent)}"),
                Column("harm_likelihood", "whole number", f"from 1: {_steps(form.harm_likelihood)}"),
            ]
            if form.harm
            else []
        ),
        *(Column(f"tag_{key}", "0 or 1", f"tagged as: {words}") for key, words in form.tags.items()),
        *(
            [
                Column("verdict", "text", "accept, reject or correct"),
                Column("correction", "text", "the corrected answer"),
            ]
            if form.verdict
            else []
        ),
        Column("words", "whole number", "length of the answer as its arm gave it"),
        Column("list_marks", "whole number", "bullets and numbered lines in it"),
        Column("headings", "whole number", "headings in it"),
        Column("emphasis", "whole number", "bold, italic or code spans in it"),
        Column("shown_words", "whole number", "length of the answer as it was shown"),
    ]


GUESSES = [
    *(column for column in _WHO if column.name != "purpose"),
    Column("letter", "text", "as which answer it was shown"),
    Column("arm", "text", "arm that gave the answer"),
    Column("guess", "text", "who the reader thinks wrote it; empty: I do not know"),
    Column("truth", "text", "what the protocol calls who wrote it"),
    Column("right", "0 or 1", "empty: I do not know"),
]

EVENTS = [
    Column("seq", "whole number", "order of events, without gaps"),
    Column("at", "time", "by the server's clock (UTC)"),
    Column("actor", "text", "who did it; coordinator for what was done by a command"),
    Column(
        "kind",
        "text",
        "protocol, freeze, amend, invite, enter, begin, open, save, undo, close, leave, withdraw, hand over",
    ),
    Column("position", "whole number", "page of the actor"),
    Column(
        "body",
        "JSON",
        "what was entered or changed; letters are those that the person saw; empty if left out with a withdrawn person",
    ),
    Column("chain", "text", "SHA-256 of the event and of the chain before it"),
]


def _steps(words: tuple[str, ...]) -> str:
    return ", ".join(f"{number} {word}" for number, word in enumerate(words, start=1))
