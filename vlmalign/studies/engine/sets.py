"""Sets drawn from sources: which cases, once and for all, written down with their content's SHA-256.

Process 0 draws and writes; all processes read what it wrote. Every drawn film is decoded. One that cannot be stops the
run, or with `on_bad: skip` is listed in `skipped.jsonl`, and the set is drawn again without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmalign.data.films.depth import check_depth
from vlmalign.data.films.images import BadImage, read_film
from vlmalign.data.overlap.films import marks_of_film
from vlmalign.data.records.pyramid import draw_layers, layers
from vlmalign.data.records.records import Records
from vlmalign.data.sampling.bounds import share_of
from vlmalign.data.sampling.sampler import balanced_sample, random_sample
from vlmalign.data.sources.films import Films
from vlmalign.progress import Progress
from vlmalign.studies.engine.config import StudyConfig, set_ref
from vlmalign.studies.engine.files import Hashes, read_rows, write_json, write_rows
from vlmalign.studies.engine.set_config import Set
from vlmalign.types import Example

#: the file of a set that has no parts, and of what it holds of each label
CASES, COVERAGE, SKIPPED = "cases", "coverage.json", "skipped.jsonl"
#: a row of the former
CASE = {"id": str, "patient": str}
#: in a row of a record: what it tells (`Records.twins`)
TWIN = "twin"

Source = Any  #: what a source opens as: `Films`, `Records`, or `Rows` of turns, records or questions


@dataclass(frozen=True)
class Cases:
    """A drawn set, or a part of one: `cases[i]` is an `Example`, read when it is asked for."""

    name: str  #: NAME or NAME.PART
    source: Source
    places: np.ndarray  #: of its cases in the source
    rows: Sequence[Mapping[str, Any]]  #: as they were written down

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.places[index])]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels; empty for cases without."""
        return self.source.schema.labels if isinstance(self.source, Films) else ()

    def column(self, name: str) -> list[Any]:
        """What is known of each case under this name, None where it has nothing."""
        if isinstance(self.source, Films | Records):
            return list(self.source.column(name)[self.places])
        return [self[i].meta.get(name) for i in range(len(self))]


def draw(config: StudyConfig, name: str, source: Source, left_out: set[str], folder: Path, progress: Progress) -> None:
    """Draw the set `name` and write it into `folder`. `left_out` are patients of other sets of the source, and what their
    records tell.

    Raises:
        BadImage: for a film that cannot be decoded, with `on_bad: error`.
        ValueError: when the source has too few cases, or a label has.
    """
    section = config.sets[name]
    seed = config.seed if section.seed is None else section.seed
    skipped = [{"dataset": section.from_, **row} for row in source.skipped]
    for note in source.notes if isinstance(source, Records) else ():
        progress.say(f"source {section.from_}: {note}")
    bad: set[int] = set()
    marks: dict[int, dict[str, Any]] = {}
    for note in source.notes if isinstance(source, Films) else ():
        progress.say(f"set {name}: {note}")
    while True:
        drawn, more = _drawn(name, section, source, left_out, bad, seed)
        fresh = sorted({int(place) for part in drawn.values() for place in part} - marks.keys())
        wrong = _read_once(name, source, fresh, marks, section.on_bad == "skip", progress)
        if not wrong:
            break
        bad |= set(wrong)
        ids = source.ids()
        skipped += [
            {"dataset": section.from_, "id": str(ids[i]), "path": "", "reason": why} for i, why in wrong.items()
        ]
        progress.say(f"set {name}: {len(wrong)} films cannot be read; drawing again without them")
    if isinstance(source, Films):
        check_depth((source[i].image for part in drawn.values() for i in map(int, part)), bits=source.bits)
    write_rows(folder / SKIPPED, skipped)
    twins = source.twins() if isinstance(source, Records) else None
    for part, places in drawn.items():
        rows = (_row(source[int(i)], marks[int(i)]) | ({} if twins is None else {TWIN: twins[i]}) for i in places)
        write_rows(folder / f"{part}.jsonl", rows)
    if isinstance(source, Films | Records) and len(source.schema):
        write_json(folder / COVERAGE, found := _coverage(section, source, drawn) | more)
        for part, of in found["sets"].items() if isinstance(source, Records) else ():
            if absent := [label for label, count in of["counts"].items() if not count]:
                progress.say(f"set {name}: {part} has no record with {', '.join(absent)}")


def open_cases(config: StudyConfig, ref: str, source: Source) -> Cases:
    """A set that was drawn, by its reference NAME or NAME.PART."""
    name, part = set_ref(ref)
    parts = [part] if part is not None else list(config.sets[name].parts) or [CASES]
    rows = [row for each in parts for row in read_rows(config.run / "sets" / name / f"{each}.jsonl", CASE)]
    place = {id: number for number, id in enumerate(source.ids())}
    missing = [row["id"] for row in rows if row["id"] not in place]
    if missing:
        raise ValueError(
            f"set {ref}: {len(missing)} of its cases are no longer in source {config.sets[name].from_}, such "
            f"as {missing[0]}; restore the source, or draw again with --redo {name}"
        )
    return Cases(ref, source, np.array([place[row["id"]] for row in rows], int), rows)


def check_images(cases: Cases, hashes: Hashes, progress: Progress) -> None:
    """Raises ValueError, naming it, for an image that is not the one that the set was drawn with."""
    progress.stage(f"images of {cases.name}, as drawn", max(1, len(cases)))
    for number, row in enumerate(cases.rows):
        example = cases[number]
        if example.image is not None:
            then = {str(example.image): row["sha256"]}
        else:
            then = dict(zip(sorted(set(images_in(example.meta))), row.get("images", ()), strict=False))
        for image, digest in then.items():
            if not Path(image).is_file() or hashes.of(Path(image)) != digest:
                raise ValueError(
                    f"{image} is not the image that set {cases.name} was drawn with; restore it, or draw again with --redo "
                    f"{set_ref(cases.name).name}"
                )
        progress.update(number + 1)


def images_in(value: Any) -> Iterator[str]:
    """Paths of the image parts in rows of turns."""
    if isinstance(value, Mapping):
        if value.get("type") == "image" and isinstance(value.get("image"), str):
            yield value["image"]
        for inner in value.values():
            yield from images_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from images_in(inner)


def patients_of(config: StudyConfig, ref: str) -> set[str]:
    """The patients of a drawn set; and of records what they tell, by its SHA-256: a twin is as good as the same patient."""
    name, part = set_ref(ref)
    parts = [part] if part is not None else list(config.sets[name].parts) or [CASES]
    rows = [row for each in parts for row in read_rows(config.run / "sets" / name / f"{each}.jsonl", CASE)]
    return {row[key] for row in rows for key in ("patient", TWIN) if key in row}


def draw_patients(patients: np.ndarray, cases: int, *, seed: int) -> np.ndarray:
    """Places of whole patients in random order until `cases` of them are reached, the last patient cut: ascending."""
    names, owner = np.unique(patients, return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(names))[owner]
    return np.sort(np.argsort(rank, kind="stable")[:cases])


def _drawn(
    name: str, section: Set, source: Source, left_out: set[str], bad: set[int], seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Part -> places of its cases, ascending; and what else `coverage.json` says of them."""
    patients = np.asarray(source.patients())
    usable = np.setdiff1d(_asked_for(name, section, source, left_out), np.fromiter(bad, int, len(bad)))
    wanted = sum(section.parts.values()) or section.size or 1
    if section.draw != "balanced":
        usable = usable[[patients[i] not in left_out for i in usable]] if left_out else usable
    if len(usable) < wanted:
        apart = f" outside {', '.join(section.apart)}" if section.apart else ""
        raise ValueError(
            f"sets.{name}: {wanted} cases were asked for, source {section.from_} has {len(usable)} that can be read{apart}"
        )
    if section.draw == "whole":
        return {CASES: usable}, {}
    if section.draw == "random":
        return {CASES: usable[random_sample(patients[usable], section.size, seed=seed, exclude_patients=set())]}, {}
    if section.draw == "patients":
        return {CASES: usable[draw_patients(patients[usable], section.size, seed=seed)]}, {}
    if section.draw == "pyramid":
        if not isinstance(source, Records):
            raise ValueError(f"sets.{name}.draw: a pyramid is of records, and source {section.from_} has none")
        try:
            found, report = layers(source, usable, section.pyramid, seed=seed)
            chosen = draw_layers(found, section.parts, seed=seed)
        except ValueError as error:
            raise ValueError(f"sets.{name}: {error}") from error
        return {part: usable[each] for part, each in chosen.items()}, {"pyramid": report}
    if not isinstance(source, Films | Records):
        raise ValueError(f"sets.{name}.draw: balanced needs labels, and source {section.from_} is rows without any")
    sizes = section.parts or {CASES: section.size}
    found = balanced_sample(
        source.label_matrix()[usable],
        patients[usable],
        source.schema.labels,
        sizes=sizes,
        seed=seed,
        floor=section.floor,
        floors=section.floors,
        cap=section.cap,
        caps=section.caps,
        films_per_patient=section.films_per_patient,
        exclude_patients=left_out,
    )
    return {part: usable[each.indices] for part, each in found.sets.items()}, {}


def _asked_for(name: str, section: Set, source: Source, left_out: set[str]) -> np.ndarray:
    """Places of the cases that `where` and `hash` take, without twins of those left out."""
    keep = np.ones(len(source), bool)
    if (section.where or section.hash) and not isinstance(source, Films | Records):
        raise ValueError(f"sets.{name}: where and hash choose films or records, and source {section.from_} is rows")
    for column, values in section.where.items():
        cells, wanted = np.array([str(cell) for cell in source.column(column)], object), [str(each) for each in values]
        if absent := [each for each in wanted if each not in cells]:
            known = ", ".join(repr(cell[:40]) for cell in sorted(set(cells))[:12])
            raise ValueError(f"sets.{name}.where.{column}: no case has {absent[0]!r}; found {known}")
        keep &= np.isin(cells, wanted)
    if isinstance(source, Records) and (section.hash is not None or left_out):
        twins = source.twins()
        if section.hash is not None:
            place = np.array([int(twin[:13], 16) / 16**13 for twin in twins])
            keep &= (section.hash[0] <= place) & (place < section.hash[1])
        keep &= [twin not in left_out for twin in twins]
    elif section.hash is not None:
        raise ValueError(f"sets.{name}.hash: films have no inputs to hash; draw patients, or whole with where")
    return np.flatnonzero(keep)


def _read_once(
    name: str, source: Source, places: Sequence[int], marks: dict[int, dict[str, Any]], skip: bool, progress: Progress
) -> dict[int, str]:
    """Fill in the marks of these cases; returns place -> reason of films that cannot be decoded."""
    bad = {}
    if len(places) and isinstance(source, Films):
        progress.stage(f"check films of {name}", len(places))
    for done, place in enumerate(places, start=1):
        try:
            marks[place] = _mark(source[place], getattr(source, "bits", 16))
        except (BadImage, FileNotFoundError) as error:
            if not skip:
                raise
            bad[place] = str(error)
        if isinstance(source, Films):
            progress.update(done)
    return bad


def _mark(example: Example, bits: int) -> dict[str, Any]:
    """What tells a case by its content: SHA-256 and difference hash of a film that can be decoded, or SHA-256 of a row and
    of each of its images, in the order of their paths."""
    if example.image is None:
        content = json.dumps(example.meta, sort_keys=True, default=str).encode("utf-8", "backslashreplace")
        images = [hashlib.sha256(read_film(image)).hexdigest() for image in sorted(set(images_in(example.meta)))]
        return {"sha256": hashlib.sha256(content).hexdigest()} | ({"images": images} if images else {})
    return marks_of_film(example.image, bits=bits)._asdict()


def _row(example: Example, mark: Mapping[str, Any]) -> dict[str, Any]:
    labels = {"labels": list(example.labels)} if example.image is not None else {}
    return {"id": example.id, "patient": example.patient, **labels, **mark}


def _bounds(section: Set, labels: Sequence[str]) -> dict[str, Any]:
    """The common floor, and the floors and caps of single labels, as shares."""
    sizes = section.parts or {CASES: section.size}
    capped = {label: cap for label in labels if (cap := section.caps.get(label, section.cap)) is not None}
    return {
        "floor": share_of(section.floor, sizes),
        "floors": {label: share_of(floor, sizes) for label, floor in section.floors.items()},
        "caps": {label: share_of(cap, sizes) for label, cap in capped.items()},
    }


def _coverage(section: Set, source: Films | Records, drawn: Mapping[str, np.ndarray]) -> dict[str, Any]:
    labels, matrix, patients = source.schema.labels, source.label_matrix(), source.patients()
    everything = {"pool": np.arange(len(source)), **drawn}
    return {
        "labels": list(labels),
        **(_bounds(section, labels) if section.draw == "balanced" else {"floor": 0.0}),
        "sets": {
            name: {
                "films": len(part),
                "patients": len(set(patients[part])),
                "counts": dict(zip(labels, matrix[part].sum(axis=0).tolist(), strict=True)),
            }
            for name, part in everything.items()
        },
    }
