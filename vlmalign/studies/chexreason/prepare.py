"""Which films are trained and tested on: drawn once, decoded once, and written down in the run folder's `data/`.

Of several processes the first does that, and all read what it wrote.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlmalign.data.films.images import BadImage, load_image
from vlmalign.data.sampling.sampler import balanced_sample, random_sample
from vlmalign.exchange import from_first
from vlmalign.progress import Progress
from vlmalign.studies.chexreason.config import ChexReasonConfig
from vlmalign.studies.chexreason.films import LabelledFilms, draw_patients

SETS = ("sft", "rl", "validation", "test")
COVERAGE = "coverage.json"


@dataclass(frozen=True)
class Sets:
    """Rows of the training source, by set."""

    rows: Mapping[str, np.ndarray]


def prepare(config: ChexReasonConfig, films: LabelledFilms, progress: Progress) -> Sets:
    """Draw the sets, or read what an earlier start of this run drew.

    Every drawn film is decoded. One that cannot be raises BadImage, or with `data.on_bad: skip` is listed in
    `data/skipped.jsonl` and the sets are drawn again without it.
    """
    drawn = from_first(lambda: _remembered(config, films, progress))
    place = {id: row for row, id in enumerate(films.dataset.ids())}
    return Sets({name: np.array([place[id] for id in ids], int) for name, ids in drawn.items()})


def _remembered(config: ChexReasonConfig, films: LabelledFilms, progress: Progress) -> dict[str, list[str]]:
    """The ids of every set, as they are on record; drawn and written first where they are not."""
    folder = config.run / "data"
    if not (folder / COVERAGE).exists():
        _write_sets(config, films, folder, progress)
    return {name: [row["id"] for row in _read(folder / f"{name}.jsonl")] for name in SETS}


def _write_sets(config: ChexReasonConfig, films: LabelledFilms, folder: Path, progress: Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = films.dataset.ids()
    skipped = [{"dataset": config.data.train.name, **row} for row in films.dataset.skipped]
    bad: set[int] = set()
    checked: set[int] = set()
    while True:
        rows = _draw(config, films, bad)
        fresh = sorted({int(r) for part in rows.values() for r in part} - checked)
        found = _decode(films, fresh, skip=config.data.on_bad == "skip", progress=progress)
        checked |= set(fresh)
        if not found:
            break
        bad |= set(found)
        skipped += [
            {"dataset": config.data.train.name, "id": str(ids[row]), "path": _path(films, row), "reason": reason}
            for row, reason in found.items()
        ]
        progress.say(f"skipped {len(found)} unreadable films; drawing again without them")
    _write(folder / "skipped.jsonl", skipped)
    for name, part in rows.items():
        examples = [films.example(int(row)) for row in part]
        _write(folder / f"{name}.jsonl", ({"id": e.id, "patient": e.patient, "labels": e.labels} for e in examples))
    # Written last: its presence says that the folder is whole.
    part = (folder / COVERAGE).with_suffix(".partial")
    part.write_text(json.dumps(_coverage(config, films, rows), indent=1) + "\n", encoding="utf-8")
    part.replace(folder / COVERAGE)


def _draw(config: ChexReasonConfig, films: LabelledFilms, bad: set[int]) -> dict[str, np.ndarray]:
    sample = config.data.sample
    usable = np.setdiff1d(np.arange(len(films)), np.fromiter(bad, int, len(bad)))
    patients, matrix = films.patients[usable], films.matrix[usable]
    test = draw_patients(patients, sample.test, seed=config.seed)
    held = set(patients[test].tolist())
    drawn = balanced_sample(
        matrix,
        patients,
        films.labels,
        sizes={"sft": sample.sft, "rl": sample.rl},
        seed=config.seed,
        floor=sample.floor,
        films_per_patient=sample.films_per_patient,
        exclude_patients=held,
    )
    validation = random_sample(
        patients, sample.validation, seed=config.seed, exclude_patients=held | set(drawn.patients)
    )
    found = {name: part.indices for name, part in drawn.sets.items()} | {"validation": validation, "test": test}
    return {name: usable[rows] for name, rows in found.items()}


def _decode(films: LabelledFilms, rows: list[int], *, skip: bool, progress: Progress) -> dict[int, str]:
    """Row -> reason, of films that cannot be decoded."""
    bad = {}
    progress.stage("check films", max(1, len(rows)))
    for done, row in enumerate(rows, start=1):
        try:
            load_image(films.dataset[row].image, size_hint=64)
        except (BadImage, FileNotFoundError) as error:
            if not skip:
                raise
            bad[row] = str(error)
        progress.update(done)
    return bad


def _path(films: LabelledFilms, row: int) -> str:
    try:
        return str(films.dataset[row].image)
    except FileNotFoundError as error:
        return str(error)


def _coverage(config: ChexReasonConfig, films: LabelledFilms, rows: Mapping[str, np.ndarray]) -> dict[str, Any]:
    everything = {"pool": np.arange(len(films)), **rows}
    return {
        "labels": list(films.labels),
        "floor": config.data.sample.floor,
        "sets": {
            name: {
                "films": len(part),
                "patients": len(np.unique(films.patients[part])),
                "counts": dict(zip(films.labels, films.matrix[part].sum(axis=0).tolist(), strict=True)),
            }
            for name, part in everything.items()
        },
    }


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
