"""Example cases for the report: which ones, by a rule without taste, and their films, small enough to embed.

The rule: cases of a data set in the order of a hash of their identifier (so file names, and with them dates and
patients, do not decide); a case whose truth has not been shown yet goes before one whose has.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vlmalign.reporting.image_places import image_places
from vlmalign.reporting.record import Row
from vlmalign.reporting.words import in_words

PER_KIND = 3  # right and wrong cases shown per data set
SIDE = 288  # px, longest side of an embedded film
LONGEST_TEXT = 3000  # characters of a completion; a model that never stops would fill the page


@dataclass(frozen=True)
class Example:
    """One case with the answer of the last stage, and what other stages answered."""

    id: str
    stage: str
    right: bool | None  #: a valid answer that says exactly what is true; None: the task knows no truth
    chips: bool  #: the three lists below say all: truth and answer are labels, or the answer meets constraints or not
    hits: list[str]  #: true and predicted; constraints that hold
    missed: list[str]  #: true, not predicted; constraints that do not hold
    false_alarms: list[str]  #: predicted, not true
    unknown: list[str]  #: names that the task does not know
    truth: str  #: in words
    answer: str  #: in words
    valid: bool
    reason: str | None
    text: str  #: the reasoning; of a completion that is not valid, or that has none, all of it
    text_left_out: int  #: characters
    others: dict[str, str]  #: another stage -> its answer, in words
    picture: str | None  #: data URI
    picture_problem: str | None  #: why there is none; None for a case without an image


def choose_examples(rows: Sequence[Row], order: Sequence[str], run: Path, *, per_kind: int = PER_KIND) -> list[Example]:
    """A few cases of one data set that the last stage of `order` got right, then a few it got wrong (or that cannot be
    right or wrong). Rule: top of this file."""
    last = max((row["stage"] for row in rows), key=order.index)
    shuffled = sorted(
        (row for row in rows if row["stage"] == last),
        key=lambda row: hashlib.sha256(row["id"].encode("utf-8", "replace")).digest(),
    )
    others = {(row["stage"], row["id"]): row for row in rows if row["stage"] != last}
    stages = [stage for stage in order if stage != last]
    film = films(run)
    return [
        example(row, {stage: others[stage, row["id"]] for stage in stages if (stage, row["id"]) in others}, film)
        for right in (True, False, None)
        for row in _new_truths_first(row for row in shuffled if _right(row) is right)[:per_kind]
    ]


class Film(NamedTuple):
    """A film for a page."""

    picture: str | None  #: data URI; None for a case without an image
    problem: str | None  #: why there is no picture of its image


def films(run: Path) -> Callable[[str | None], Film]:
    """From the name of an image to its film; each is read once."""
    place = image_places(run)

    @cache
    def film(image: str | None) -> Film:
        try:
            return Film(film_uri(place(image)) if image else None, None)
        except FileNotFoundError:
            return Film(None, "image not found")
        except (OSError, ValueError):
            return Film(None, "image not readable")

    return film


def film_uri(path: Path) -> str:
    """The film as a small grey JPEG in a data URI. Raises OSError or ValueError if it cannot be read."""
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            image.draft("L", (SIDE, SIDE))  # lets JPEG decode at a fraction of its size
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
            grey = image.convert("L")
    except Image.DecompressionBombError as error:
        raise ValueError("too many pixels") from error
    except SyntaxError as error:  # Pillow's word for a damaged PNG
        raise ValueError("damaged image") from error
    grey.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    grey.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def example(row: Row, others: Mapping[str, Row], film: Callable[[str | None], Film]) -> Example:
    """One answer as it is shown; `others` are those of other states to the same case."""
    truth, predicted = row.get("truth"), row.get("predicted")
    lists = isinstance(truth, list) and isinstance(predicted, list)
    if lists and _checks(row):
        hits, missed, false = (
            [in_words(each) for each, held in zip(truth, predicted, strict=True) if held is kind]
            for kind in (True, False, None)
        )
    elif lists:
        hits = [label for label in truth if label in predicted]
        missed = [label for label in truth if label not in predicted]
        false = [label for label in predicted if label not in truth]
    else:
        hits, missed, false = [], [], []
    text = (row["reasoning"] if row["valid"] else "") or row["completion"]
    picture, problem = film(row["image"])
    return Example(
        id=row["id"],
        stage=row["stage"],
        right=_right(row),
        chips=lists,
        hits=hits,
        missed=missed,
        false_alarms=false,
        unknown=row.get("unknown") or [],
        truth=in_words(truth),
        answer=_answer(row),
        valid=row["valid"],
        reason=row["reason"],
        text=text[:LONGEST_TEXT],
        text_left_out=max(0, len(text) - LONGEST_TEXT),
        others={stage: _answer(other) for stage, other in others.items()},
        picture=picture,
        picture_problem=problem,
    )


def _answer(row: Row) -> str:
    return in_words(row.get("predicted")) if row["valid"] else "no valid answer"


def _checks(row: Row) -> bool:
    """Whether the truth is constraints, and the answer which of them hold."""
    predicted = row["predicted"]
    return len(predicted) == len(row["truth"]) > 0 and all(isinstance(held, bool) for held in predicted)


def _right(row: Row) -> bool | None:
    truth, predicted = row.get("truth"), row.get("predicted")
    if truth is None:
        return None
    if isinstance(truth, dict) and isinstance(predicted, dict):  # fields; of some the truth is not known
        known = [name for name, value in truth.items() if value is not None]
        return row["valid"] and all(_key(truth[name]) == _key(predicted.get(name)) for name in known)
    if isinstance(truth, list) and isinstance(predicted, list) and _checks(row):
        return all(predicted)
    only_unknown = bool(row.get("unknown")) and not predicted
    return row["valid"] and not only_unknown and _key(truth) == _key(predicted)


def _key(value: Any) -> str:
    """Equal for equal values; the order of a list does not count."""
    return json.dumps(sorted(map(str, value)) if isinstance(value, list) else value, sort_keys=True)


def _new_truths_first(rows: Iterable[Row]) -> list[Row]:
    seen: set[str] = set()
    new, more = [], []
    for row in rows:
        truth = _key(row.get("truth"))
        (more if truth in seen else new).append(row)
        seen.add(truth)
    return new + more
