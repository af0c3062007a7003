"""The form of a page: is a reader's entry one that the form allows, and what is missing before the case can be closed?

An entry is JSON: {"preference": "A", "tie" or "none"; "confidence": 0...; "comment": text; "answers": {"A":
{"criteria": {key: 0...}, "harm_likelihood": 0..., "harm_extent": 0..., "tags": [key], "verdict": "accept", "reject" or
"correct", "correction": text, "guess": 0...}}}. Numbers are indices into the protocol's words. What is not filled in is not there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmalign.review.assignment import Purpose
from vlmalign.review.protocol import Form
from vlmalign.review.refusal import Refused

Entry = dict[str, Any]

TIE, NONE = "tie", "none"
VERDICTS = ("accept", "reject", "correct")
UNKNOWN = -1  #: "I do not know", of a guess
MAX_TEXT = 8000  #: characters of a comment or a correction


def check(form: Form, purpose: Purpose, letters: str, guesses: Sequence[str], entry: Any) -> Entry:
    """The entry, in the order of the form, with nothing in it that the form does not ask.

    Raises:
        Refused: for a field that the form does not have, or a value that it does not offer.
    """
    found: Entry = {}
    own = _section(entry, "entry")
    answers = _section(own.pop("answers", {}), "answers")
    if purpose != "guess":
        if form.preference and "preference" in own:
            found["preference"] = _one(own.pop("preference"), (*letters, TIE, NONE), "preference")
        if form.preference and form.confidence and "confidence" in own:
            found["confidence"] = _index(own.pop("confidence"), form.confidence, "confidence")
        if form.comment and "comment" in own:
            found["comment"] = _text(own.pop("comment"), "comment")
    _nothing_else(own, "entry")
    judged = {}
    for letter in letters:
        answer = _section(answers.pop(letter, {}), f"answer {letter}")
        judged[letter] = _guess(guesses, letter, answer) if purpose == "guess" else _judged(form, letter, answer)
        _nothing_else(answer, f"answer {letter}")
    _nothing_else(answers, "answers")
    found["answers"] = judged
    return found


def missing(form: Form, purpose: Purpose, letters: str, entry: Entry) -> list[str]:
    """What must still be filled in, in words for the reader."""
    lacking = []
    if purpose == "guess":
        return [f"Answer {letter}: who wrote it" for letter in letters if "guess" not in entry["answers"][letter]]
    if form.preference and "preference" not in entry:
        lacking.append("which answer is better")
    if form.preference and form.confidence and "confidence" not in entry:
        lacking.append("how sure you are")
    for letter in letters:
        answer = entry["answers"][letter]
        asked = [words for key, words in form.criteria.items() if key not in answer.get("criteria", {})]
        if form.harm:
            asked += [
                words
                for key, words in (("harm_extent", "extent of harm"), ("harm_likelihood", "likelihood of harm"))
                if key not in answer
            ]
        if form.verdict and "verdict" not in answer:
            asked.append("accept, reject or correct")
        if answer.get("verdict") == "correct" and not answer.get("correction", "").strip():
            asked.append("the correction")
        lacking += [f"Answer {letter}: {words}" for words in asked]
    return lacking


def _judged(form: Form, letter: str, answer: Entry) -> Entry:
    where = f"answer {letter}"
    found: Entry = {}
    if form.criteria and "criteria" in answer:
        given = _section(answer.pop("criteria"), where)
        found["criteria"] = {key: _index(given.pop(key), form.scale, key) for key in form.criteria if key in given}
        _nothing_else(given, where)
    if form.harm:
        for key, steps in (("harm_likelihood", form.harm_likelihood), ("harm_extent", form.harm_extent)):
            if key in answer:
                found[key] = _index(answer.pop(key), steps, key)
    if form.tags and "tags" in answer:
        given = answer.pop("tags")
        if not isinstance(given, list) or not all(isinstance(tag, str) and tag in form.tags for tag in given):
            raise Refused(f"The form has no such tags for {where}.", 400)
        found["tags"] = [tag for tag in form.tags if tag in given]
    if form.verdict:
        if "verdict" in answer:
            found["verdict"] = _one(answer.pop("verdict"), VERDICTS, "verdict")
        if "correction" in answer:
            found["correction"] = _text(answer.pop("correction"), "correction")
    return found


def _guess(guesses: Sequence[str], letter: str, answer: Entry) -> Entry:
    if "guess" not in answer:
        return {}
    value = answer.pop("guess")
    return {"guess": UNKNOWN if value == UNKNOWN and type(value) is int else _index(value, guesses, f"guess {letter}")}


def _section(value: Any, where: str) -> Entry:
    if not isinstance(value, Mapping):
        raise Refused(f"The {where} is not what the form sends.", 400)
    return dict(value)


def _nothing_else(left: Mapping[str, Any], where: str) -> None:
    if left:
        raise Refused(f"The {where} has fields that the form does not have.", 400)


def _one(value: Any, choices: Sequence[str], where: str) -> str:
    if not isinstance(value, str) or value not in choices:
        raise Refused(f"The form does not offer this {where}.", 400)
    return value


def _index(value: Any, choices: Sequence[str], where: str) -> int:
    if type(value) is not int or not 0 <= value < len(choices):  # True would count as 1
        raise Refused(f"The form does not offer this value of {where}.", 400)
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise Refused(f"The {where} is not a text.", 400)
    if len(value) > MAX_TEXT:
        raise Refused(f"The {where} is longer than {MAX_TEXT:,} characters; shorten it.", 400)
    # Half a surrogate pair has no bytes in UTF-8: neither a page nor a file could hold it.
    return value.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")
