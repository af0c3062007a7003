"""The films that a teacher is asked about, and the image that is sent: a JPEG of bounded size without metadata."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmalign.data.films.images import BadImage, decode_image, read_film
from vlmalign.data.sources.films import Films
from vlmalign.studies.engine.config import StudyConfig, set_ref
from vlmalign.studies.engine.sets import open_cases

QUALITY = 90


class Film(NamedTuple):
    """A drawn film with its true labels."""

    id: str
    image: str  #: path of its file
    labels: tuple[str, ...]
    sha256: str  #: of its file when the set was drawn
    bits: int  #: that 16-bit grey uses


class Asked(NamedTuple):
    """The films of some sets of a study, in order, each once, and the names of their labels."""

    films: tuple[Film, ...]
    labels: tuple[str, ...]


def films_of(study: StudyConfig, refs: Sequence[str]) -> Asked:
    """The drawn films of the sets NAME or NAME.PART.

    Raises:
        ValueError: naming the set, for one that the study does not have, that is a test set, that has not been drawn,
            whose cases are no films, or whose labels have other names than those of the set before it.
    """
    found: dict[str, Film] = {}
    labels: tuple[str, ...] | None = None
    for ref in refs:
        name, part = set_ref(ref)
        section = study.sets.get(name)
        parts = [] if section is None else [f"{name}.{each}" for each in section.parts] or [name]
        if section is None or ref not in parts:
            every = [*study.sets] if section is None else parts
            raise ValueError(f"--set {ref}: no such set; this study has {', '.join(every) or 'none'}")
        if section.role == "test":
            raise ValueError(f"--set {ref} is a test set; traces are for training, choose another set")
        if not (study.run / "sets" / name / f"{part or 'cases'}.jsonl").is_file():
            raise ValueError(
                f"--set {ref} has not been drawn in {study.run}; draw it first: vlmalign run STUDY.yaml --only sets/{name}"
            )
        source = study.sources[section.from_].open(study.place)
        if not isinstance(source, Films):
            raise ValueError(f"--set {ref}: source {section.from_} is rows; traces are written about films with labels")
        if labels not in (None, source.schema.labels):
            raise ValueError(f"--set {ref}: its labels have other names than those of {refs[0]}; ask about it alone")
        labels = source.schema.labels
        cases = open_cases(study, ref, source)
        for number, row in enumerate(cases.rows):
            case = cases[number]
            found.setdefault(case.id, Film(case.id, str(case.image), case.labels, row["sha256"], source.bits))
    return Asked(tuple(found.values()), labels or ())


def data_uri(film: Film, side: int) -> str:
    """The film as `data:image/jpeg;base64,...`, its longer side at most `side` pixels, without any metadata of its file.

    Text that is burnt into the pixels stays.

    Raises:
        FileNotFoundError, BadImage: for a film that cannot be read, or is not the one that the set was drawn with.
    """
    data = read_film(film.image)
    if hashlib.sha256(data).hexdigest() != film.sha256:
        raise BadImage(f"{film.image} is not the image that its set was drawn with; restore it, or draw the set again")
    # Pixels alone go into a new image: Pillow would carry a JPEG's comment along.
    image = Image.fromarray(np.asarray(decode_image(data, film.image, bits=film.bits)))
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    image.save(written, "JPEG", quality=QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode('ascii')}"
