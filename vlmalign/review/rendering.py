"""How an answer is shown: made alike by the protocol's rule, as plain text. What identifies a writer goes before it is sent.

`render(rule, text)` is a pure function of text; pages escape what it returns. Form is not taken away where it is
content: lines and lists stay.
"""

from __future__ import annotations

import re
import unicodedata

from vlmalign.review.protocol import Rendering

_TAG = re.compile(r"</?[A-Za-z][\w-]{0,40}(?:\s[^<>\n]{0,200})?/?>")
_HEADING = re.compile(r"^[ \t]{0,3}#{1,6}[ \t]+(.*?)[ \t]*#*[ \t]*$", re.MULTILINE)
_UNDERLINE = re.compile(r"^([^\n]*\S[^\n]*)\n[ \t]{0,3}(?:={3,}|-{3,})[ \t]*$", re.MULTILINE)
_BOLD_LINE = re.compile(r"^[ \t]*(\*\*|__)([^*_\n]+)\1[ \t]*:?[ \t]*$", re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[^\n]*$", re.MULTILINE)
_EMPHASIS = re.compile(r"(\*\*\*|\*\*|__|\*|`)(?=\S)(.+?)(?<=\S)\1")
_BULLET = re.compile(r"^([ \t]*)[-*+•‣–][ \t]+", re.MULTILINE)
_RULE = re.compile(r"^[ \t]*(?:-[ \t]*){3,}$|^[ \t]*(?:\*[ \t]*){3,}$", re.MULTILINE)


def render(rule: Rendering, text: str) -> str:
    """`text` as readers see it; "" when nothing is left of it.

    >>> render(Rendering(hide=("think",)), "<think>Hm.</think>\\n## Findings\\n* **No** effusion\\n</solution>")
    'Findings\\n- No effusion'
    """
    text = unicodedata.normalize("NFC", text).replace("\r\n", "\n").replace("\r", "\n")
    for name in rule.hide:
        # A block that was cut off before its end is left out up to the end of the answer.
        text = re.sub(rf"<{name}>.*?(?:</{name}>|\Z)", "", text, flags=re.DOTALL | re.IGNORECASE)
    if rule.tags:
        text = _TAG.sub("", text)
    text = _headings(rule, text)
    if rule.markdown:
        text = _RULE.sub("", _FENCE.sub("", text))
        text = _BULLET.sub(r"\1- ", text)
        for _ in range(3):  # bold within italics, and code within those
            text = _EMPHASIS.sub(r"\2", text)
    for pattern in rule.remove:
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    lines = "\n".join(line.rstrip() for line in text.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n ")


def _headings(rule: Rendering, text: str) -> str:
    if rule.headings == "keep":
        return text
    new = r"\1" if rule.headings == "plain" else ""
    text = _UNDERLINE.sub(new, _HEADING.sub(new, text))
    return text if rule.headings == "plain" else _BOLD_LINE.sub("", text)


def word_count(text: str) -> int:
    """Words of a text.

    >>> word_count("the patient's follow-up, in 2 weeks")
    6
    """
    return len(re.findall(r"\w+(?:['’-]\w+)*", text))


def form_counts(text: str) -> dict[str, int]:
    """Length and formatting of a text, which are known to sway readers: words, list marks, headings, emphasis.

    >>> form_counts("# Plan\\n- **rest**\\n- fluids")
    {'words': 3, 'list_marks': 2, 'headings': 1, 'emphasis': 1}
    """
    return {
        "words": word_count(text),
        "list_marks": len(_BULLET.findall(text)) + len(re.findall(r"^[ \t]*\d+[.)][ \t]+", text, re.MULTILINE)),
        "headings": len(_HEADING.findall(text)) + len(_UNDERLINE.findall(text)) + len(_BOLD_LINE.findall(text)),
        "emphasis": len(_EMPHASIS.findall(text)),
    }
