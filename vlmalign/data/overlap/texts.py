"""When two questions are the same: by their normalised words, and by the runs of 13 words that they share.

Any shared 13-gram (Brown et al. 2020, appendix C) would call most of clinical English an overlap: "which of the following
is the most likely underlying cause of this patient's" alone is 13 words. So a question counts when a training question
holds at least 30 % of its 13-grams, phrases apart that stand in more than ten evaluation questions.

Measured: MedQA's US test set, every second question against the others: 1 of 637 counts, a vignette told twice (62 % of
its 13-grams, the next 20 %), where 129 share any 13-gram. MedQA against MMLU's professional medicine: 0 of 272, 68
share any. CMExam's validation set, every second against the others: 41 of 3,406, 89 share any;
those at 30 to 50 % are one vignette with two questions, or one article of law.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

GRAM = 13  #: words
#: Share of an evaluation question's 13-grams that one training question must hold.
SHARE = 0.3
#: A 13-gram in more evaluation questions than this is a phrase of the field or of a template, and does not count.
COMMON = 10

# Chinese and Japanese are written without spaces: each character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")


class TextMark(NamedTuple):
    """What is kept of a question to know it again; the text cannot be read from it."""

    question: str  #: SHA-256 of the normalised words, hexadecimal; "" for a question without words
    grams: tuple[int, ...]  #: 64-bit hashes of its 13-grams, ascending; none for a shorter question


def marks_of_text(question: str) -> TextMark:
    """The mark of a case's own question (without the prompt that all cases share), the same in every process."""
    words = words_of(question)
    runs = {" ".join(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)}
    grams = sorted(int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest()) for run in runs)
    return TextMark(hashlib.sha256(" ".join(words).encode()).hexdigest() if words else "", tuple(grams))


def words_of(text: str) -> list[str]:
    """The words of a text without case, punctuation, layout and compatibility forms of characters.

    >>> words_of("A 52-year-old man\\nＷＢＣ: 9 000; 诊断？")
    ['a', '52', 'year', 'old', 'man', 'wbc', '9', '000', '诊', '断']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def near_questions(training: Sequence[TextMark], evaluation: Sequence[TextMark]) -> list[tuple[int, int]]:
    """(index in training, index in evaluation) of questions that share 13-grams but are not the same question.

    Each question with such a partner in the other set is listed with the one that it shares most with.
    """
    ours, theirs = _indices(training), _indices(evaluation)
    holders = defaultdict(list)  # 13-gram -> evaluation questions
    for question, indices in theirs.items():
        for gram in evaluation[indices[0]].grams:
            holders[gram].append(question)
    holders = {gram: questions for gram, questions in holders.items() if len(questions) <= COMMON}
    countable = Counter(question for questions in holders.values() for question in questions)
    best: dict[str, tuple[int, str]] = {}  # evaluation question -> most 13-grams shared, with which training question
    pairs = set()
    for question, indices in ours.items():
        shared = Counter(other for gram in training[indices[0]].grams for other in holders.get(gram, ()))
        near = [(count, other) for other, count in shared.items() if count >= SHARE * countable[other]]
        near = [(count, other) for count, other in near if other != question]
        if near:
            pairs.add((question, max(near, key=lambda one: one[0])[1]))
        for count, other in near:
            if count > best.get(other, (0, ""))[0]:
                best[other] = (count, question)
    pairs |= {(question, other) for other, (_, question) in best.items()}
    return sorted(pair for question, other in pairs for pair in paired(ours[question], theirs[other]))


def paired(training: Sequence[int], evaluation: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs in which each index of either side stands at least once: as many as the longer side has.

    >>> paired([3, 5], [0, 1, 2])
    [(3, 0), (5, 1), (5, 2)]
    """
    longer = max(len(training), len(evaluation))
    return [(training[min(i, len(training) - 1)], evaluation[min(i, len(evaluation) - 1)]) for i in range(longer)]


def _indices(marks: Sequence[TextMark]) -> dict[str, list[int]]:
    """Where each question stands."""
    indices = defaultdict(list)
    for index, mark in enumerate(marks):
        if mark.question:
            indices[mark.question].append(index)
    return indices
