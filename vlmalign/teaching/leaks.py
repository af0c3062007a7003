"""Leaks: sentences by which a trace gives away that its author was told the labels.

A trace is taught as if the model had seen everything itself. A student that learns "as the labels state" refers to labels
that nobody gives it. The table is a net of phrases, not an understanding of text: it refuses a trace that merely sounds
like one, which costs another question, and the expert review is there for what it lets through.
"""

from __future__ import annotations

import re

_TOLD = (
    r"(?:given|provided|supplied|stated|listed|specified|indicated|mentioned|told|assigned|known|confirmed|annotated)"
)
_LABELS = r"(?:labels?|annotations?|findings?|diagnos[ei]s|answers?|report|solution|conditions?|metadata|instructions?)"

#: what a leak is about -> the phrases, matched without regard to case
LEAKS = {
    "truth": r"\bground[- ]truth\b|\bgold[- ]standard\b|\b(?:true|correct|reference|target|expected|actual) (?:labels?|answers?|findings?|diagnos[ei]s)\b",
    "labels": r"\blabel(?:s|led|ed|ing)?\b|\bannotat(?:ion|ions|ed|or|ors)\b|\bdata ?set\b",
    "told": rf"\b{_TOLD} (?:(?!the |these |those |this |that |an? )\w+ )?{_LABELS}\b|\b(?:the|these|those|this|my|your) {_LABELS} (?:that )?(?:(?:i|we) )?(?:was|were|is|are|have been|has been|had been)? ?(?:already )?(?:given|provided|supplied|told|listed|specified|known)\b(?! (?:above|before|earlier|here|so far)\b)",
    "given": rf"\b(?:given|based on|according to|in line with|per|matching|to match|in accordance with|knowing) (?:the|that the|your) {_LABELS}\b(?! (?:of|in|on|at|above|below|along)\b)",
    "told so": r"\bas (?:(?:was|were|already|i was|i am|has been) )?(?:given|provided|stated|instructed|requested|required|specified|told|listed|labelled|labeled)\b(?! (?:above|before|earlier)\b)",
    "i was told": r"\b(?:i|we) (?:was|were|am|are|have been|had been|already) (?:told|given|informed|instructed|asked|know|knew)\b|\byou (?:have )?(?:told|given|gave|provided|said|asked|listed|stated|mentioned)\b|\b(?:was|were) provided\b|\bprovided (?:to me|with|information|data|context|list)\b|\b(?:information|data|context|list|details) (?:provided|given|supplied)\b",
    "known": r"\b(?:is|are|was|were) (?:already )?known to (?:be|have|show)\b|\b(?:already|beforehand|in advance) (?:know|known|knew|told|given)\b|\bknown in advance\b|\bthe known (?:findings?|diagnos[ei]s)\b",
    "task": r"\bas if (?:unaided|i (?:did not|didn't|do not) know|seen for the first time)\b|\b(?:the|this|these|your|my) (?:instructions?|prompt|task|user)\b|\b(?:training text|student)\b",
    "answer": r"\b(?:previous|earlier|last|first|prior) (?:answer|attempt|response|version)\b|\b(?:here is|here's) (?:the|a|my) (?:\w+ ){0,3}(?:reading|narrative|analysis|trace|text|version|answer)\b|\bas an ai\b|\blanguage model\b|\b(?:i'm sorry|i cannot|i can't|i am unable)\b",
    "report": r"\b(?:the|this|official|radiology|original|accompanying) (?:radiology )?report (?:states?|says?|mentions?|notes?|describes?|confirms?|lists?|indicates?)\b|\bper (?:the )?report\b",
}  # fmt: skip

_PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in LEAKS.items()}


def leaks(text: str) -> list[str]:
    """The kinds of leak that a trace holds, as `LEAKS` names them; white space and curly quotes do not matter.

    >>> leaks("The heart is wide, as the labels state."), leaks("The heart is wide.")
    (['labels'], [])
    """
    plain = " ".join(text.replace("’", "'").split())
    return [kind for kind, pattern in _PATTERNS.items() if pattern.search(plain)]
