"""The pages of the application: templates filled with what a reader may see, and with nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from vlmalign.reporting.pages import environment
from vlmalign.review.adjudication import Opinion
from vlmalign.review.form import NONE, TIE, UNKNOWN, VERDICTS
from vlmalign.review.material import Study
from vlmalign.review.protocol import Protocol
from vlmalign.review.refusal import Refused
from vlmalign.review.votes import Page

HERE = Path(__file__).resolve().parent / "templates"
STATIC = {"review.css": "text/css", "review.js": "text/javascript"}


@cache
def _environment() -> jinja2.Environment:
    made = environment(HERE)
    made.filters["enumerated"] = _enumerated
    return made


@cache
def static(name: str) -> tuple[bytes, str]:
    """(content, media type) of a script or style sheet. Raises Refused for any other name."""
    if name not in STATIC:
        raise Refused("There is no such page here.", 404)
    return (HERE / name).read_bytes(), STATIC[name]


def render(template: str, protocol: Protocol, **context: Any) -> str:
    """A page as text."""
    title = f"Simulated: {protocol.title}" if protocol.simulated else protocol.title
    return _environment().get_template(template).render(title=title, protocol=protocol, **context)


def case_context(study: Study, page: Page, opinions: list[Opinion]) -> dict[str, Any]:
    """What the page of a case shows. Whether it is a repetition or an attention case cannot be told from it."""
    protocol, place = study.protocol, page.place
    case = study.material.case(place.case)
    answers = [
        (letter, study.material.answer(place.case, number).text)
        for letter, number in zip(place.letters, place.shown, strict=True)
    ]
    guesses = protocol.design.guesses
    questions = place.purpose == "guess"
    number, of = place.position, page.pages
    if place.purpose != "adjudication":
        number, of = (number - (of - guesses), guesses) if questions else (number, of - guesses)
    return {
        "number": number,
        "of": of,
        "guessing": questions,
        "adjudicating": place.purpose == "adjudication",
        "position": place.position,
        "revision": page.revision,
        "active_ms": page.active_ms,
        "can_undo": page.can_undo,
        "record": case.record,
        "films": len(case.films),
        "answers": answers,
        "entry": page.entry,
        "form": protocol.form,
        "guesses": protocol.guesses,
        "opinions": opinions,
        "preferences": _preferences(place.letters),
        "verdicts": list(zip(VERDICTS, ("Accept", "Reject", "Needs correction"), strict=True)),
        "unknown": UNKNOWN,
    }


def _preferences(letters: str) -> list[tuple[str, str]]:
    """(value, words) of the choices; those of two answers stand on their sides."""
    if len(letters) == 2:
        return [("A", "A is better"), (TIE, "No difference"), ("B", "B is better"), (NONE, "Neither is acceptable")]
    return [
        *((letter, f"{letter} is best") for letter in letters),
        (TIE, "No difference"),
        (NONE, "None is acceptable"),
    ]


def _enumerated(words: Sequence[str]) -> list[tuple[int, str]]:
    """Choices whose value is their place."""
    return list(enumerate(words))
