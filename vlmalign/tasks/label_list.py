"""A list of labels as models write it -> which labels of the schema it names, and which names it does not know.

One reader serves rewards and metrics, so they cannot disagree about an answer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

from vlmalign.tasks.spelling import bare, fold, visible

#: name of the schema -> other names for it
Synonyms = tuple[tuple[str, tuple[str, ...]], ...]

_SEPARATOR = re.compile(r"[,;\r\n\v\f\x85\u2028\u2029，；、､،؛﹐﹑﹔]")
# Within a piece, in single-spaced text: what ends a sentence or begins an item of a list on one line, and what joins.
_BREAK = re.compile(r"(\. | \(?\d{1,2}[.)] | (?:and|plus) | ?[&/|+] ?|以及|[和及与])", re.IGNORECASE)
_ENDS = re.compile(r"\. | \(?\d")
_NEGATION = re.compile(
    r"\b(?:no|not|non|without|absen(?:t|ce)|negative|neither|nor|never|free|denie[sd]|excluded?|unlikely|ruled? out"
    r"|rather|instead)\b|n't\b|[不无非没未]",
    re.IGNORECASE,
)
_HEADING = re.compile(
    r"[\W_]{0,8}(?:(?:(?:the|final|predicted|positive) ){0,2}"
    r"(?:labels?|findings?|answers?|solution|diagnos[ei]s|predictions?|conclusion|impression)|标签|诊断|答案|结论)"
    r"(?:[\W_]{0,3}[:：]| (?:are|is)\b:?)",
    re.IGNORECASE,
)
_FENCE = re.compile(r"`{3,}\w{0,10}")
_NOTHING = {"none", "n/a", "nil", "null", "nothing", "no label", "no labels", "none of the above", "none of the labels"}
_NOTHING |= {"none of these", "无"}


class Mentions(NamedTuple):
    """What a list of labels says."""

    labels: tuple[str, ...]  #: known labels in the order of the schema, each once
    unknown: tuple[str, ...]  #: every mention of another name, without its list marks, in the order written
    duplicates: int  #: mentions of a known label after its first


class Index(NamedTuple):
    """The names of a schema, ready for reading."""

    single: Mapping[str, str]  #: folded name -> label
    parts: Mapping[tuple[str, ...], str]  #: folded parts of a name that holds a separator -> label
    most_parts: int
    most_atoms: int  #: most pieces that a name falls into at full stops and where words and signs join
    longest: int  #: characters; anything longer is no name, and is not looked up


@lru_cache(maxsize=64)
def label_index(labels: tuple[str, ...], synonyms: Synonyms = ()) -> Index:
    """How to find the labels again.

    Raises ValueError if there is no label, if one could never be read back (blank, nothing but list marks, or with a line
    break), if two names differ only in case, spacing and underscores, if a synonym belongs to no label or to two, and if
    a name that holds a separator could also be read as the end of one name and the beginning of another.

    >>> dict(label_index(("Edema", "No_Finding")).single)
    {'edema': 'Edema', 'no finding': 'No_Finding'}
    """
    if not labels:
        raise ValueError("labels must hold at least one name, found none; give the label schema")
    names = [(label, label) for label in labels]
    for label, others in synonyms:
        if label not in labels:
            raise ValueError(
                f"synonyms must be of labels of the schema {labels}, found {label!r}; correct its spelling"
            )
        names += [(other, label) for other in others]
    exact: dict[tuple[str, ...], tuple[str, str]] = {}
    stripped: dict[tuple[str, ...], set[str]] = {}
    for name, label in names:
        key = _key(name)
        if key in exact:
            raise ValueError(
                f"labels and synonyms must differ in more than case, spacing and underscores, found {exact[key][0]!r} "
                f"and {name!r}; drop one"
            )
        exact[key] = name, label
        stripped.setdefault(tuple(fold(bare(part)) for part in key), set()).add(label)
    _check_overlaps(list(exact), {key: name for key, (name, _) in exact.items()})
    # Marks around a name are taken off before it is looked up, so names that have such marks are known without them too,
    # where that does not make one name of two.
    known = {key: next(iter(found)) for key, found in stripped.items() if len(found) == 1 and all(key)}
    known |= {key: label for key, (_, label) in exact.items()}
    return Index(
        single=MappingProxyType({key[0]: label for key, label in known.items() if len(key) == 1}),
        parts=MappingProxyType({key: label for key, label in known.items() if len(key) > 1}),
        most_parts=max(map(len, known)),
        most_atoms=max(len(_BREAK.split(part)) // 2 + 1 for key in known for part in key),
        longest=64 + 3 * max(len(name) for name, _ in names),
    )


def read_label_list(text: str, labels: tuple[str, ...], synonyms: Synonyms = ()) -> Mentions:
    """What `text` names among `labels`. The rule, ours:

    - The list is split at commas, semicolons and line breaks of any width. A piece is compared without regard to case,
      spacing and underscores, and without what lists and Markdown put around names: bullets, numbers, a final full stop,
      bold, quotes, the brackets of a JSON list, a heading such as "Labels:". A known name is taken whole first, so names
      may hold separators and the word "and" themselves.
    - A piece that is no known name is split into sentences, and these at "and", "plus", "&", "/", "|" and "+", if that
      gives a known name. A sentence with a word of negation is not taken apart: "no edema and fracture" names nothing.
    - Names are matched whole and never searched for. What is no known name is one unknown name; nothing is guessed from
      its spelling (synonyms are a setting). An answer of nothing but "none" names nothing.

    Linear in the length of the text. Raises ValueError for unusable labels (see `label_index`).

    >>> read_label_list("- **Edema**\\n- fracture and flu.", ("Fracture", "Edema"))
    Mentions(labels=('Fracture', 'Edema'), unknown=('flu',), duplicates=0)
    """
    reader = _Reader(label_index(labels, synonyms))
    names, found = reader.read(text)
    if len(names) == 1 and found[0] is None and len(names[0]) < 30 and fold(names[0]) in _NOTHING:
        return Mentions((), (), 0)
    mentions = [label for label in found if label is not None]
    distinct = set(mentions)
    return Mentions(
        tuple(label for label in labels if label in distinct),
        tuple(name for name, label in zip(names, found, strict=True) if label is None),
        len(mentions) - len(distinct),
    )


# Names and what they were found to be, None for unknown. Two lists, not pairs: the garbage collector would visit each.
_Found = tuple[list[str], list[str | None]]


class _Reader:
    def __init__(self, index: Index):
        self._index = index
        self._folded: dict[str, tuple[str, str]] = {}

    def read(self, text: str) -> _Found:
        pieces = [" ".join(piece.split()) for piece in _SEPARATOR.split(visible(text))]
        if self._label(pieces[0]) is None and (heading := _HEADING.match(pieces[0])):
            pieces[0] = pieces[0][heading.end() :]
        # Each distinct piece is looked at once: a list may hold the same one a hundred thousand times.
        distinct = dict.fromkeys(pieces)
        starts = {key[0] for key in self._index.parts}
        openers = {piece for piece in distinct if starts and not starts.isdisjoint(self._folds(piece))}
        known: dict[str, _Found] = {piece: self._names(piece) for piece in distinct}
        names: list[str] = []
        found: list[str | None] = []
        here = 0
        while here < len(pieces):
            label, taken = self._several(pieces, here) if pieces[here] in openers else (None, 1)
            if label is not None:
                names.append(", ".join(pieces[here : here + taken]))
                found.append(label)
            else:
                names += known[pieces[here]][0]
                found += known[pieces[here]][1]
            here += taken
        return names, found

    def _several(self, pieces: list[str], here: int) -> tuple[str | None, int]:
        """The label whose name begins here and goes over several pieces, and how many."""
        for count in range(min(self._index.most_parts, len(pieces) - here), 1, -1):
            for key in zip(*map(self._folds, pieces[here : here + count]), strict=True):
                if (label := self._index.parts.get(key)) is not None:
                    return label, count
        return None, 1

    def _label(self, name: str) -> str | None:
        whole, without_marks = self._folds(name)
        return self._index.single.get(whole) or self._index.single.get(without_marks)

    def _folds(self, name: str) -> tuple[str, str]:
        """The name folded, with its list marks and without; "" for what is too long to be one."""
        if len(name) > self._index.longest:
            return "", ""
        if (found := self._folded.get(name)) is None:
            found = self._folded[name] = fold(name), fold(bare(name))
        return found

    def _names(self, text: str) -> _Found:
        """What one piece names."""
        if (label := self._label(text)) is not None:
            return [text], [label]
        name = bare(text)
        if not name or _FENCE.fullmatch(text):
            return [], []
        tokens = _BREAK.split(name)  # atoms and what stands between them, alternately
        names: list[str] = []
        found: list[str | None] = []
        here = begin = first = 0  # atom; first atom of the sentence; first name of the sentence
        while 2 * here < len(tokens):
            label, taken = self._run(tokens, here)
            if atom := bare("".join(tokens[2 * here : 2 * (here + taken) - 1])):
                names.append(atom)
                found.append(label)
            here += taken
            if 2 * here > len(tokens) or _ENDS.match(tokens[2 * here - 1]):
                unknown = [atom for atom, label in zip(names[first:], found[first:], strict=True) if label is None]
                if unknown and (len(unknown) == len(names) - first or any(map(_NEGATION.search, unknown))):
                    names[first:] = [bare("".join(tokens[2 * begin : 2 * here - 1]))]
                    found[first:] = [None]
                begin, first = here, len(names)
        return (names, found) if any(label is not None for label in found) else ([name], [None])

    def _run(self, tokens: list[str], here: int) -> tuple[str | None, int]:
        """The label that the most atoms from here on make up, and how many they are."""
        for count in range(min(self._index.most_atoms, len(tokens) // 2 + 1 - here), 0, -1):
            if (label := self._label("".join(tokens[2 * here : 2 * (here + count) - 1]))) is not None:
                return label, count
        return None, 1


def _key(name: Any) -> tuple[str, ...]:
    """The folded parts of a name of the schema, between separators."""
    if not isinstance(name, str) or not bare(visible(name)).strip() or len(name.splitlines()) > 1:
        raise ValueError(f"a label must be a name in one line with letters or digits, found {name!r}; rename it")
    return tuple(fold(part) for part in _SEPARATOR.split(visible(name)))


def _check_overlaps(keys: list[tuple[str, ...]], names: Mapping[tuple[str, ...], str]) -> None:
    """ "A, B" cannot be told from the end of one name and the beginning of the next."""
    ends = {key[-size:] for key in keys for size in range(1, len(key) + 1)}
    begins = {key[:size] for key in keys for size in range(1, len(key) + 1)}
    for key in keys:
        for cut in range(1, len(key)):
            if key[:cut] in ends and key[cut:] in begins:
                raise ValueError(
                    f"the label {names[key]!r} cannot be told from a list of other labels, because a comma or semicolon "
                    "stands in its name and its parts are names too; rename it"
                )
