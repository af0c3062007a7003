"""Example films for the report: which ones, by a rule without taste, and their pixels, small enough to embed.

The rule: films of a data set in the order of a hash of their identifier (so file names, and with them dates and
patients, do not decide); a film whose true labels have not been shown yet goes before one whose have.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmalign.reporting.run_folder import STAGES

PER_KIND = 3  # right and wrong films shown per data set
SIDE = 288  # px, longest side of an embedded film
LONGEST_TEXT = 3000  # letters of a completion; a model that never stops would fill the page


@dataclass(frozen=True)
class Example:
    """One film with the answer of the last stage, and the label sets other stages predicted."""

    id: str
    stage: str
    right: bool  #: a valid completion that predicts exactly the true set
    hits: list[str]  #: true and predicted
    missed: list[str]  #: true, not predicted
    false_alarms: list[str]  #: predicted, not true
    valid: bool
    reason: str | None
    text: str  #: the reasoning; of a completion that is not valid, all of it
    text_left_out: int  #: letters
    others: dict[str, str]  #: earlier stage -> what it predicted, in words
    picture: str | None  #: data URI
    picture_problem: str | None


def choose_examples(
    predictions: Sequence[Mapping[str, Any]], dataset: str, run: Path, *, per_kind: int = PER_KIND
) -> list[Example]:
    """A few films of `dataset` that the last stage got right, then a few it got wrong. Rule: top of this file."""
    rows = [row for row in predictions if row["dataset"] == dataset]
    if not rows:
        return []
    last = max((row["stage"] for row in rows), key=STAGES.index)
    shuffled = sorted(
        (row for row in rows if row["stage"] == last),
        key=lambda row: hashlib.sha256(row["id"].encode("utf-8", "replace")).digest(),
    )
    earlier = {(row["stage"], row["id"]): row for row in rows if row["stage"] != last}
    chosen = [
        row
        for right in (True, False)
        for row in _new_truths_first(row for row in shuffled if _right(row) == right)[:per_kind]
    ]
    return [_example(row, earlier, run) for row in chosen]


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


def _example(row: Mapping[str, Any], earlier: Mapping[tuple[str, str], Mapping[str, Any]], run: Path) -> Example:
    truth, predicted = row["truth"], row["predicted"]
    text = row["reasoning"] if row["valid"] else row["completion"]
    picture, problem = None, None
    try:
        picture = film_uri(run / row["image"])  # an absolute path stays as it is
    except FileNotFoundError:
        problem = "film not found"
    except (OSError, ValueError):
        problem = "film not readable"
    return Example(
        id=row["id"],
        stage=row["stage"],
        right=_right(row),
        hits=[label for label in truth if label in predicted],
        missed=[label for label in truth if label not in predicted],
        false_alarms=[label for label in predicted if label not in truth],
        valid=row["valid"],
        reason=row["reason"],
        text=text[:LONGEST_TEXT],
        text_left_out=max(0, len(text) - LONGEST_TEXT),
        others={stage: _in_words(other) for stage in STAGES if (other := earlier.get((stage, row["id"]))) is not None},
        picture=picture,
        picture_problem=problem,
    )


def _in_words(row: Mapping[str, Any]) -> str:
    if not row["valid"]:
        return "no valid answer"
    return ", ".join(row["predicted"]) or "no label"


def _right(row: Mapping[str, Any]) -> bool:
    return row["valid"] and set(row["truth"]) == set(row["predicted"])


def _new_truths_first(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    seen: set[frozenset[str]] = set()
    new, more = [], []
    for row in rows:
        truth = frozenset(row["truth"])
        (more if truth in seen else new).append(row)
        seen.add(truth)
    return new + more
