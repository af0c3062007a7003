"""Labels in running text: which of a schema a trace names as present.

The rule, ours. A text is cut into clauses at sentence ends, semicolons, colons, words such as "but", and commas that begin
a new clause ("..., there is"). A mention of a label counts as claimed unless its clause denies it: a word of denial, or of
looking for something, stands before the mention ("no", "without", "free of", "look for"), or a phrase of denial directly
follows it ("is absent", "not seen", ": none"). "Cannot exclude" and hedges count as claims. The rule knows words, not
grammar; expert review is there for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

NORMAL = "No Finding"

#: CheXpert label -> how prose says it, beside the label's own name. These count as naming a true label and as claiming one.
SAID = {
    "No Finding": r"no findings?(?= *(?:[.,;]|$| on this| is (?:present|seen)| (?:are|can be) seen| at all))|(?:is|are|as|a|an|entirely|completely) normal (?:frontal )?(?:chest )?(?:film|study|radiograph|x-?ray|chest)|(?:film|study|radiograph|x-?ray) is (?:entirely |completely )?normal|no (?:acute )?cardiopulmonary (?:abnormality|process|disease|findings?)",
    "Enlarged Cardiomediastinum": r"enlarge(?:d|ment of the) (?:cardio)?-?mediastin\w+|cardiomediastinal (?:silhouette|contour) is (?:(?!not |never |neither |hardly )\w+ )?(?:enlarged|widened|wide)|widened mediastinum|mediastinal widening|mediastinum is (?:(?!not |never |neither |hardly )\w+ )?(?:widened|wide|enlarged)",
    "Cardiomegaly": r"cardiomegaly|enlarged heart|cardiac enlargement|heart is (?:(?!not |never |neither |hardly )\w+ )?enlarged",
    "Lung Opacity": r"(?:lung|pulmonary) opacit(?:y|ies)|(?:lung|pulmonary) opacification",
    "Lung Lesion": r"(?:lung|pulmonary) (?:lesion|nodule|mass)(?:e?s)?",
    "Edema": r"o?edema",
    "Consolidation": r"consolidations?",
    "Pneumonia": r"(?:broncho)?pneumonias?",
    "Atelectasis": r"atelectas[ie]s",
    "Pneumothorax": r"(?:hydro)?pneumothora(?:x|ces)",
    "Pleural Effusion": r"pleural effusions?|effusions? (?:in|of) the pleural space",
    "Pleural Other": r"pleural (?:other|thickening|plaques?|calcifications?)",
    "Fracture": r"fractures?|fractured",
    "Support Devices": r"support devices?|(?:endotracheal|tracheostomy|nasogastric|feeding|chest|orogastric) tubes?|(?:central|venous|picc) (?:venous )?(?:lines?|catheters?)|pacemakers?|defibrillators?",
}  # fmt: skip

#: CheXpert label -> wider words that name it where it is true, and claim nothing where it is not: they are evidence of others
SAID_WIDELY = {
    "Lung Opacity": r"opacit(?:y|ies)|opacification",
    "Lung Lesion": r"lesions?|nodules?|mass(?:es)?",
    "Pleural Effusion": r"effusions?",
    "Support Devices": r"devices?|tubes?|catheters?|leads?",
    "Atelectasis": r"atelectatic",
    "Consolidation": r"consolidated|consolidative",
}

_NOT_A_DENIAL = re.compile(
    r"\b(?:can(?:not|'t| not) (?:be )?(?:excluded?|ruled? out)|not (?:be )?(?:excluded?|ruled out)|not only|no doubt"
    r"|no (?:\w+ )?(?:change|increase|decrease|progression|improvement) (?:in|of))\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"(?<!\d)\.(?=\s|$)|(?<=\d)\.(?=\s)|[;!?\n]|\b(?:but|however|although|though|whereas|while|yet|except|apart from|aside from|other than)\b"
    r"|,? (?:and|so) (?:there|the|this|these|it|its|i) |, (?:there|the|this|these|it|its|i|with) ",
    re.IGNORECASE,
)
_BEFORE = re.compile(
    r"\b(?:no|not|without|absen(?:t|ce)|negative for|neither|nor|never|free|lacks?|den(?:y|ies|ied)|exclud(?:e|es|ed|ing)"
    r"|rul(?:e|es|ed|ing) out|unlikely|against|rather than|instead of|unlike"
    r"|(?:look|looks|looking|looked|search|searching|searched|check|checking|checked|assess|assessing|evaluate|evaluating) for"
    r"|rule out|whether)\b|n't\b",
    re.IGNORECASE,
)
_VERB = r"(?: (?:is|are|was|were|has been|have been|can be|could be|appears?|looks|seems?))?"
_AFTER = re.compile(
    rf"(?: or [\w ]{{1,40}}?| and [\w ]{{1,40}}?)?(?:{_VERB} (?:therefore |thus |also |less |very |clearly )?(?:absent|excluded|unlikely|ruled out|denied|likely not)\b"
    rf"|{_VERB} not\b(?! only| excluded| ruled)|{_VERB} (?:nowhere|never)\b|(?: is| are)n't\b| ?[:-] (?:none|no|absent|negative|not)\b)",
    re.IGNORECASE,
)


def claimed(text: str, labels: Iterable[str], synonyms: Mapping[str, Sequence[str]] = {}) -> tuple[str, ...]:
    """The labels that the text says are present, by their own names, their `synonyms` and the words of `SAID`, in the order
    given.

    >>> claimed("No pneumothorax or edema. The heart is enlarged.", ["Cardiomegaly", "Edema", "Pneumothorax"])
    ('Cardiomegaly',)
    """
    return _present(text, {label: _words(label, tuple(synonyms.get(label, ())), wide=False) for label in labels})


def named(text: str, labels: Iterable[str], synonyms: Mapping[str, Sequence[str]] = {}) -> tuple[str, ...]:
    """As `claimed`, with the words of `SAID_WIDELY` as well: what is enough for a label that is true.

    >>> named("An opacity covers the left base.", ["Lung Opacity"])
    ('Lung Opacity',)
    """
    return _present(text, {label: _words(label, tuple(synonyms.get(label, ())), wide=True) for label in labels})


def label_faults(text: str, truth: Iterable[str], labels: Sequence[str]) -> list[str]:
    """What a trace says amiss: true labels that it does not name as present, and others that it does.

    >>> label_faults("Oedema in both lungs.", ["Edema", "Fracture"], ["Edema", "Fracture", "Pneumonia"])
    ['does not name Fracture as present']
    """
    true = [label for label in labels if label in set(truth)]
    found = named(text, true)
    wrong = [f"does not name {label} as present" for label in true if label not in found]
    return wrong + [f"claims {label}" for label in claimed(text, labels) if label not in true]


def _present(text: str, words: Mapping[str, re.Pattern[str]]) -> tuple[str, ...]:
    plain = _NOT_A_DENIAL.sub(" ", text.replace("’", "'").replace("**", ""))
    clauses = [clause for clause in _CLAUSE.split(plain) if clause.strip()]
    return tuple(
        label for label, pattern in words.items() if any(_claims(label, pattern, clause) for clause in clauses)
    )


def _claims(label: str, pattern: re.Pattern[str], clause: str) -> bool:
    if label != NORMAL:  # what says that a film is normal denies nothing else in the clause
        clause = _words(NORMAL, wide=False).sub(" ", clause)
    for found in pattern.finditer(clause):
        before = clause[: found.start()].rpartition(":")[2]
        # The names of normal films hold the denial themselves.
        if not _BEFORE.search(before) and (label == NORMAL or not _AFTER.match(clause, found.end())):
            return True
    return False


@lru_cache(maxsize=256)
def _words(label: str, synonyms: tuple[str, ...] = (), *, wide: bool) -> re.Pattern[str]:
    parts = [_name(synonym) for synonym in synonyms]
    parts += [table[label] for table in (SAID, SAID_WIDELY)[: 1 + wide] if label in table]
    if label != NORMAL:  # whose own name begins many a sentence that is about something else
        parts.append(_name(label) + ("" if label in SAID else "s?"))
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)


def _name(name: str) -> str:
    """A name as a pattern, however its words are joined."""
    return re.escape(name.replace("_", " ")).replace(r"\ ", r"[\s_-]+")
