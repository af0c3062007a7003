"""Which cases of a training set an evaluation set holds too, and the error text that says so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlmalign.data.overlap.films import FilmMark, near_films
from vlmalign.data.overlap.texts import TextMark, near_questions, paired

Kind = Literal["patient", "case", "path", "content", "copy", "question", "13-gram"]

#: What the error says of the rows of each kind.
MEANINGS: dict[Kind, str] = {
    "patient": "of the same patient",
    "case": "with the same id",
    "path": "with the same image path",
    "content": "whose image files are the same bytes",
    "copy": "whose images look the same; look at these pairs",
    "question": "with the same question",
    "13-gram": "whose questions share much of their wording; read these pairs",
}
#: Pairs that the error names for each kind.
SHOWN = 3


@dataclass(frozen=True)
class SetMarks:
    """What is kept of a set to compare it with another."""

    name: str  #: in the study's `sets`
    #: Which source it is drawn from: its kind and its table or root. Patients, ids and paths are compared only between
    #: sets of one origin: patient 7 of one archive is not patient 7 of another.
    origin: str
    #: One a case: "id", "patient", and what applies of "path", "sha256" and "dhash" (see films.FilmMark), "question" and
    #: "grams" (see texts.TextMark).
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Overlap:
    """The cases that two sets share in one way."""

    kind: Kind
    #: (id in training, id in evaluation), in the evaluation set's order. Each case that has a partner stands in at least
    #: one pair, with its nearest partner where there is a distance; not every combination is listed.
    pairs: list[tuple[str, str]]


def overlaps(training: SetMarks, evaluation: SetMarks) -> list[Overlap]:
    """The ways in which `evaluation` holds what `training` holds, in the order of MEANINGS; none when they are apart.

    "copy" leaves out films that are the same file, and "13-gram" the same question: those are "content" and
    "question". A row with a film is compared by its film alone: one question may be asked of every film.
    """
    same_origin = training.origin == evaluation.origin
    of_films = [[row for row in marks.rows if row.get("sha256")] for marks in (training, evaluation)]
    of_texts = [[row for row in marks.rows if not row.get("sha256")] for marks in (training, evaluation)]
    every = [training.rows, evaluation.rows]
    films = [[FilmMark(row["sha256"], row["dhash"]) for row in rows] for rows in of_films]
    asked = [[row for row in rows if row.get("question")] for rows in of_texts]
    texts = [[TextMark(row["question"], row["grams"]) for row in rows] for rows in asked]
    found: dict[Kind, tuple[list, list[tuple[int, int]]]] = {
        "patient": (every, _equal(*every, "patient") if same_origin else []),
        "case": (every, _equal(*every, "id") if same_origin else []),
        "path": (every, _equal(*every, "path") if same_origin else []),
        "content": (of_films, _equal(*of_films, "sha256")),
        "copy": (of_films, near_films(*films)),
        "question": (asked, _equal(*asked, "question")),
        "13-gram": (asked, near_questions(*texts)),
    }
    return [
        Overlap(kind, [(ours[i]["id"], theirs[j]["id"]) for i, j in sorted(pairs, key=lambda pair: pair[::-1])])
        for kind, ((ours, theirs), pairs) in found.items()
        if pairs
    ]


def describe(found: Sequence[Overlap], training: SetMarks, evaluation: SetMarks) -> str:
    """The error for at least one overlap: how many cases by which kind, a few pairs by id, and what to do."""
    ours = training.name.partition(".")[0]  # a part is drawn with its set
    lines = [f"the training set {training.name!r} overlaps the evaluation set {evaluation.name!r}:"]
    for overlap in found:
        count, theirs = (len(set(ids)) for ids in zip(*overlap.pairs, strict=True))
        shown = ", ".join(f"{one} - {other}" for one, other in overlap.pairs[:SHOWN])
        more = ", ..." if len(overlap.pairs) > SHOWN else ""
        lines.append(
            f"  {overlap.kind}: {theirs} of {len(evaluation.rows)} cases of {evaluation.name!r} and {count} of "
            f"{len(training.rows)} of {training.name!r} {MEANINGS[overlap.kind]}: {shown}{more}"
        )
    return "\n".join(
        [
            *lines,
            f"The pairs are ids, {training.name!r} first. Scores on cases that were trained on mean nothing: draw the set "
            f"apart (sets.{ours}.apart: [{evaluation.name}]), or, if this is meant, allow it by name "
            f"(sets.{ours}.may_overlap: [{evaluation.name}])",
        ]
    )


def _equal(training: Sequence[Mapping], evaluation: Sequence[Mapping], key: str) -> list[tuple[int, int]]:
    """Pairs of the rows with the same value of `key`; rows without one are no pair."""
    ours, theirs = _rows_of(training, key), _rows_of(evaluation, key)
    return [pair for value, rows in theirs.items() if value in ours for pair in paired(ours[value], rows)]


def _rows_of(rows: Iterable[Mapping], key: str) -> dict[Any, list[int]]:
    indices = defaultdict(list)
    for index, row in enumerate(rows):
        if row.get(key):
            indices[row[key]].append(index)
    return indices
