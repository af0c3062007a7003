"""The blocks of a completion, `<think>..</think> <solution>..</solution>`: how they are written and read."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

TAGS = ("<think>", "</think>", "<solution>", "</solution>")

#: think: both blocks, as ChexReason asks for; solution: the answer in its block, a think block before it or none;
#: plain: no tags are needed, and those that stand there are understood
Form = Literal["think", "solution", "plain"]

#: form -> the tags that a completion may hold, in order
ALLOWED: dict[str, tuple[tuple[str, ...], ...]] = {
    "think": (TAGS,),
    "solution": (TAGS, TAGS[2:]),
    "plain": (TAGS, TAGS[2:], TAGS[:2], ()),
}

_TAG = re.compile(r"</?(?:think|solution)>")  # no repetition: one pass over the text, whatever the text


class Blocks(NamedTuple):
    """The two blocks of a completion of valid form, trimmed, and what stands outside them; else why it is not."""

    reasoning: str  #: "" where there is no think block
    solution: str
    outside: str  #: before, between and after the blocks, one piece per line
    reason: str | None  #: None if the form is valid


def in_blocks(form: Form, reasoning: str, solution: str) -> str:
    """A completion of this form. Only the form `think` has the reasoning in it.

    >>> in_blocks("think", "Fluid.", "Edema"), in_blocks("plain", "", "Edema")
    ('<think>Fluid.</think><solution>Edema</solution>', 'Edema')
    """
    if form == "plain":
        return solution
    answer = f"{TAGS[2]}{solution}{TAGS[3]}"
    return answer if form == "solution" else f"{TAGS[0]}{reasoning}{TAGS[1]}{answer}"


def read_blocks(text: str, form: str = "think") -> Blocks:
    """The blocks of a completion, or why it is not of this form. Linear in the length of the text.

    ChexReason (arXiv 2512.23090) prints the form. The rule, ours:

    - A tag is one of `TAGS`, letter for letter, wherever it stands; `<Think>` is plain text. The tags of a completion
      must be exactly those of its form, in order. So missing, doubled, nested and reversed blocks are invalid, and so is
      a tag that the reasoning merely mentions: which of two tags was meant would be a guess.
    - Text outside the blocks leaves the completion valid and is kept in `outside`, for rewards that put a price on it.
      (Stop tokens left in the text would count: decode without special tokens.)
    - Without a solution block (form `plain`) the answer is what follows the think block, or all of the text; there must
      be one. A solution block may be empty.
    """
    tags = tuple(_TAG.findall(text))
    if tags not in ALLOWED[form]:
        return Blocks(reasoning="", solution="", outside="", reason=_fault(tags, form))
    found = list(_TAG.finditer(text))
    thought = found[:2] if tags[:1] == TAGS[:1] else []
    answer = found[-2:] if tags[-1:] == TAGS[-1:] else []
    before = [text[: thought[0].start()]] if thought else []
    rest = text[thought[1].end() :] if thought else text
    if answer:
        solution = text[answer[0].end() : answer[1].start()].strip()
        offset = thought[1].end() if thought else 0
        around = [*before, text[offset : answer[0].start()], text[answer[1].end() :]]
    else:
        solution, around = rest.strip(), before
        if not solution:
            return Blocks(reasoning="", solution="", outside="", reason="expected an answer, found no text")
    return Blocks(
        reasoning=text[thought[0].end() : thought[1].start()].strip() if thought else "",
        solution=solution,
        outside="\n".join(piece.strip() for piece in around if piece.strip()),
        reason=None,
    )


def answer_of(text: str) -> str:
    """Where a completion of any form gives its answer: its solution block, else what follows its last `</think>`,
    else all of it; trimmed.

    >>> answer_of("<think>A or B</think> The answer is B.")
    'The answer is B.'
    """
    blocks = read_blocks(text, "solution")
    return blocks.solution if blocks.reason is None else text.rpartition(TAGS[1])[2].strip()


def reasoning_of(text: str) -> str:
    """The text of a completion's think block, trimmed; "" where it has none or its tags are out of order.

    >>> reasoning_of("<think> A or B </think> B")
    'A or B'
    """
    return read_blocks(text, "plain").reasoning


def _fault(found: tuple[str, ...], form: str) -> str:
    """Why these tags are not those of the form, in words. Quotes tags only, never a patient's text."""
    wanted = TAGS if form == "think" or TAGS[0] in found or TAGS[1] in found else TAGS[2:]
    if form == "plain" and TAGS[2] not in found and TAGS[3] not in found:
        wanted = TAGS[:2]
    wrong = [
        f"expected {'one' if tag in wanted else 'no'} {tag}, found {found.count(tag)}"
        for tag in TAGS
        if found.count(tag) != (tag in wanted)
    ]
    return "; ".join(wrong) or f"expected the order {' '.join(wanted)}, found {' '.join(found)}"
