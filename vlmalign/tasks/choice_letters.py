"""Multiple choice: which option letters a free-text answer settles on."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

from vlmalign.tasks.blocks import answer_of

# Every repetition is bounded: two neighbouring unbounded ones would take quadratic time on a long run of spaces.
_GAP = r"[*_\s]{0,4}"
_JOIN = r"\s{0,3}(?:(?:[,，、/&+]|and\b|和)\s{0,3})?"
_NEGATION = re.compile(r"\bnot\b|n't\b|\bexcept\b|\bincorrect\b|\bwrong\b|\bneither\b|\bruled? out\b|[不非错]")
#: a sentence that begins with the article: "A patient with ...", not "A or B", "A is right"
_ARTICLE = re.compile(r"\s+(?!(?:or|and|nor|is|was|but|because|since|as|would|looks|seems|fits|then|than)\b)[a-z]")


class _Patterns(NamedTuple):
    whole: re.Pattern[str]
    stated: re.Pattern[str]
    leading: re.Pattern[str]
    lone: re.Pattern[str]
    letter: re.Pattern[str]


@lru_cache(maxsize=8)
def _patterns(letters: str) -> _Patterns:
    one = f"[{letters}]"
    several = rf"(?P<found>{one}(?:{_JOIN}{one})*)(?![A-Za-z'])"
    asked = (
        r"\\boxed\{\s{0,3}(?:\\text\{)?"
        r"|(?:\b[Aa]nswers?|ANSWER|\b[Oo]ptions?|\b[Cc]hoices?|\b[Cc]hoose|答案|选项|选择|故选|应选|选)"
        rf"{_GAP}(?:is|are|应为|为|是)?{_GAP}[:：]?{_GAP}(?:[Oo]ption\s{{1,3}})?[(\[（*]?"
    )
    return _Patterns(
        whole=re.compile(rf"[*(\[（\s]*(?P<found>(?i:{one}(?:{_JOIN}{one})*))[*)\]）.。:\s]*"),
        stated=re.compile(rf"(?:{asked}){several}"),
        leading=re.compile(rf"[*(\[（\s]*(?P<found>{one})(?:[*)\]）]+|[.:：、。)](?!\w)|\s*\n)"),
        lone=re.compile(rf"(?<![A-Za-z0-9'-])(?P<found>{one})(?![A-Za-z0-9'-])"),
        letter=re.compile(one),
    )


def choice_letters(text: str, letters: str = "ABCDE") -> str | None:
    """The option letters a completion settles on, sorted ("B", "ABD"); None where that would be a guess.

    The answer is looked for in the solution block, else after the last `</think>`, else everywhere; the first of
    these rules that finds something holds (all ours; no paper prints its extraction):

    1. nothing but letters: "B", "(b)", "A, C and D";
    2. the last statement of the kind "the answer is B", "Answer: (B)", "option B", "\\boxed{B}", "答案：B", "故选B";
    3. it begins with the option: "B. Digoxin", "(B) Digoxin", "**B**: ...";
    4. exactly one option is mentioned as a letter on its own, and no word of negation stands in the answer.

    Letters are capitals, except in rule 1. An "A" that begins a sentence as an article is no letter.

    >>> choice_letters("A looks tempting, but the answer is (B).")
    'B'
    >>> choice_letters("It could be A or B.") is None
    True
    """
    patterns = _patterns(letters)
    answer = answer_of(text)
    # The bound keeps the pattern's unbounded ends from being tried on a long text.
    if len(answer) <= 10 * len(letters) and (whole := patterns.whole.fullmatch(answer)):
        return _sorted(whole["found"].upper(), patterns)
    statements = [found for found in patterns.stated.finditer(answer) if not _is_article(answer, found)]
    if statements:
        return _sorted(statements[-1]["found"], patterns)
    if leading := patterns.leading.match(answer):
        return leading["found"]
    mentions = {found["found"] for found in patterns.lone.finditer(answer) if not _is_article(answer, found)}
    if len(mentions) == 1 and not _NEGATION.search(answer):
        return mentions.pop()
    return None


def _is_article(text: str, found: re.Match[str]) -> bool:
    before = text[max(0, found.start("found") - 8) : found.start("found")].rstrip(" *_([")
    begins = not before or before[-1] in ".!?:：\n"
    return begins and found["found"] == "A" and _ARTICLE.match(text, found.end("found")) is not None


def _sorted(found: str, patterns: _Patterns) -> str:
    return "".join(sorted(set(patterns.letter.findall(re.sub(r"(?i:\band\b)", " ", found)))))
