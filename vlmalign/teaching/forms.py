"""The formats of a trace, and what is wrong with the form of one: steps, tags, lists, length in words."""

from __future__ import annotations

import re
from typing import NamedTuple

STEPS = 12


class Form(NamedTuple):
    """What a trace of a format looks like; lengths are in words (runs of what is not white space)."""

    least: int
    most: int
    steps: int  #: numbered lines; 0: none, the trace is running text


#: ChexReason (arXiv 2512.23090) has these three and labels alone, which need no trace. It prints no lengths: these are
#: ours, and leave room in the completions of configs/chexreason/study.yaml (768 tokens, twelve steps 1,536).
FORMS = {
    "narrative": Form(least=60, most=400, steps=0),
    "reasoning-a": Form(least=80, most=700, steps=STEPS),
    "free": Form(least=15, most=200, steps=0),
}

_TAG = re.compile(r"</?[A-Za-z][\w-]*[^<>\n]{0,40}>")
_STEP = re.compile(r"^[ \t]*(?:\*\*)?(\d{1,2})[.)](?:\*\*)?[ \t]*(.*)$", re.MULTILINE)
_LIST = re.compile(r"^[ \t]*(?:[-*•#]|\d{1,2}[.)])[ \t]", re.MULTILINE)


def form_faults(text: str, form: Form) -> list[str]:
    """What is wrong with the form of a trace, in words that quote none of it; empty for a trace of this form.

    >>> form_faults("<think>A wide heart.</think>", FORMS["free"])
    ['holds a tag', 'expected 15 to 200 words, found 3']
    """
    found = []
    if _TAG.search(text):
        found.append("holds a tag")
    if "```" in text:
        found.append("holds a code fence")
    words = len(text.split())
    if not form.least <= words <= form.most:
        found.append(f"expected {form.least} to {form.most} words, found {words}")
    if form.steps:
        found += _step_faults(text, form.steps)
    elif _LIST.search(text):
        found.append("holds a list or a heading, expected running text")
    return found


def _step_faults(text: str, steps: int) -> list[str]:
    lines = [(int(number), rest.strip()) for number, rest in _STEP.findall(text)]
    numbers = [number for number, _ in lines]
    if numbers != list(range(1, steps + 1)):
        told = ", ".join(map(str, numbers[: steps + 3])) or "none"
        return [f"expected lines numbered 1 to {steps} in order, each once, found {told}"]
    found = []
    if empty := [str(number) for number, rest in lines if not re.search(r"\w", rest)]:
        found.append(f"no text in step {', '.join(empty)}")
    if _STEP.match(text.lstrip()) is None:
        found.append("text before step 1")
    return found
