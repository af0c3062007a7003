"""A completion's text -> the facts in it: is its form valid, what was reasoned, which labels are predicted.

Rewards and evaluation both read completions through this file, so a form that earns reward counts in evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

TAGS = (
    "<think>",
    "</think>",
    "<solution>",
    "</solution>",
)  #: a valid completion holds these, once each, in this order

_TAG = re.compile(r"</?(?:think|solution)>")  # no repetition: one pass over the text, whatever the text
_SEPARATOR = re.compile(r"[,;\r\n]")


@dataclass(frozen=True)
class Parsed:
    """What one completion says. An invalid completion says nothing: its sets are empty, `reason` tells why."""

    valid: bool  #: exactly one think block, followed by exactly one solution block
    reasoning: str  #: text of the think block, trimmed
    predicted: tuple[str, ...]  #: known labels, spelled as in the schema, in its order, each once
    unknown: tuple[str, ...]  #: every mention of a name that is not in the schema, trimmed, in the order written
    duplicates: int  #: mentions of a known label after its first
    outside: str  #: what stands before, between and after the blocks, trimmed, one piece per line
    reason: str | None  #: in words, why the completion is not valid; None if it is


class Blocks(NamedTuple):
    """The two blocks of a completion of valid form, trimmed, and what stands outside them; else why it is not."""

    reasoning: str
    solution: str
    outside: str  #: before, between and after the blocks, one piece per line
    reason: str | None  #: None if the form is valid


@lru_cache(maxsize=64)
def label_index(labels: tuple[str, ...]) -> Mapping[str, str]:
    """Written form (lower case, single spaces) -> label as the schema spells it.

    Raises ValueError if there is no label, if a label could never be read back (blank, or holding a separator),
    or if two labels differ only in case or spacing.

    >>> dict(label_index(("Edema", "No Finding")))
    {'edema': 'Edema', 'no finding': 'No Finding'}
    """
    if not labels:
        raise ValueError("labels must hold at least one name, found none; give the label schema")
    index: dict[str, str] = {}
    for label in labels:
        written = _written(label)
        if not written or _SEPARATOR.search(label):
            raise ValueError(
                f"a label must be a name without comma, semicolon or line break, found {label!r}; rename it"
            )
        if written in index:
            raise ValueError(
                f"labels must differ in more than case and spacing, found {index[written]!r} and {label!r}; drop one"
            )
        index[written] = label
    return MappingProxyType(index)


def parse_completion(text: str, labels: tuple[str, ...]) -> Parsed:
    """What `text` predicts among `labels`, and whether its form is valid: `<think>..</think> <solution>..</solution>`.

    ChexReason (arXiv 2512.23090) prints the form and that labels are "parsed by rule and filtered". The rule, ours:

    - A tag is one of `TAGS`, letter for letter, wherever it stands; `<Think>` is plain text. The completion is valid
      if and only if its tags are exactly `TAGS` in this order. So missing, doubled, nested and reversed blocks are
      invalid, and so is a tag that the reasoning merely mentions: which of two tags was meant would be a guess.
    - Text outside the blocks leaves the completion valid and is kept in `outside`, for rewards that put a price on it.
      (Stop tokens left in the text would count: decode without special tokens.)
    - The solution is split at commas, semicolons and line breaks; names are compared without regard to case and
      spacing. Bullets, numbers and a final full stop are part of a name, which then is unknown.
    - An empty solution is valid and predicts the empty set; so does one of unknown names only. Empty reasoning is
      valid: its length is the reward's affair.

    Linear in the length of the text. Raises ValueError for unusable labels (see `label_index`).

    >>> parse_completion("<think>Fluid.</think><solution>edema; Edema, flu</solution>", ("Fracture", "Edema"))
    Parsed(valid=True, reasoning='Fluid.', predicted=('Edema',), unknown=('flu',), duplicates=1, outside='', reason=None)
    """
    index = label_index(labels)
    blocks = read_blocks(text)
    if blocks.reason is not None:
        return Parsed(
            valid=False, reasoning="", predicted=(), unknown=(), duplicates=0, outside="", reason=blocks.reason
        )

    names = [name for piece in _SEPARATOR.split(blocks.solution) if (name := piece.strip())]
    labelled = [index.get(_written(name)) for name in names]  # no pairs: the garbage collector would visit each
    mentions = [label for label in labelled if label is not None]
    found = set(mentions)
    return Parsed(
        valid=True,
        reasoning=blocks.reasoning,
        predicted=tuple(label for label in labels if label in found),
        unknown=tuple(name for name, label in zip(names, labelled, strict=True) if label is None),
        duplicates=len(mentions) - len(found),
        outside=blocks.outside,
        reason=None,
    )


def read_blocks(text: str) -> Blocks:
    """The blocks of a completion, by the first two points of the rule in `parse_completion`."""
    reason = _fault(_TAG.findall(text))
    if reason is not None:
        return Blocks(reasoning="", solution="", outside="", reason=reason)
    think, think_end, solution, solution_end = _TAG.finditer(text)
    around = (
        text[: think.start()],
        text[think_end.end() : solution.start()],
        text[solution_end.end() :],
    )
    return Blocks(
        reasoning=text[think.end() : think_end.start()].strip(),
        solution=text[solution.end() : solution_end.start()].strip(),
        outside="\n".join(piece.strip() for piece in around if piece.strip()),
        reason=None,
    )


def answer_of(text: str) -> str:
    """Where a completion of any form gives its answer: its solution block, else what follows its last `</think>`,
    else all of it; trimmed.

    >>> answer_of("<think>A or B</think> The answer is B.")
    'The answer is B.'
    """
    blocks = read_blocks(text)
    return blocks.solution if blocks.reason is None else text.rpartition(TAGS[1])[2].strip()


def _written(name: str) -> str:
    return " ".join(name.casefold().split())


def _fault(found: list[str]) -> str | None:
    """Why these tags are not `TAGS`, in words; None if they are. Quotes tags only, never a patient's text."""
    wrong = [f"expected one {tag}, found {found.count(tag)}" for tag in TAGS if found.count(tag) != 1]
    if wrong:
        return "; ".join(wrong)
    if tuple(found) != TAGS:
        return f"expected the order {' '.join(TAGS)}, found {' '.join(found)}"
    return None
