"""Data sets as the study sees them: films with patients and a label matrix, in the names of one schema."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmalign.data.phantoms.traces import write_traces
from vlmalign.data.sources.films import Films as Dataset
from vlmalign.data.sources.formats import WRITERS, open_dataset
from vlmalign.data.sources.schema import LABEL_MAPS
from vlmalign.exchange import agree, from_first
from vlmalign.studies.chexreason.config import ChexReasonConfig, Films
from vlmalign.types import Example

#: beside an invented data set: the reasoning that leads to its labels
TRACES = "traces.jsonl"


@dataclass(frozen=True)
class LabelledFilms:
    """A data set in the names of `labels`; films[i] is decoded when it is asked for."""

    dataset: Dataset
    labels: tuple[str, ...]
    matrix: np.ndarray  #: [films, labels] bool
    patients: np.ndarray  #: [films]

    def __len__(self) -> int:
        return len(self.dataset)

    def example(self, index: int) -> Example:
        """The film with its true labels in these names."""
        found = self.dataset[index]
        truth = tuple(label for label, positive in zip(self.labels, self.matrix[index], strict=True) if positive)
        return Example(found.id, found.patient, found.image, truth, found.meta)


def open_films(films: Films, config: ChexReasonConfig) -> LabelledFilms:
    """Open a data set of the config, which process 0 writes first where it is to be invented."""
    root = config.place(films.root)
    if films.phantom is not None:
        from_first(lambda: _write_phantom(films, root))
    dataset = open_dataset(films.format, root, **films.options)
    matrix, labels = dataset.label_matrix(), dataset.schema.labels
    if films.label_map is not None:
        matrix, labels = _mapped(matrix, films.label_map)
    patients = np.asarray(dataset.patients())
    # Other films would make other batches: processes would compute different things, or wait for each other for ever.
    content = "\n".join(map(str, patients)).encode() + matrix.tobytes()
    agree(hashlib.sha256(content).hexdigest(), f"the films of {films.name}")
    return LabelledFilms(dataset, labels, matrix, patients)


def _mapped(matrix: np.ndarray, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
    table = LABEL_MAPS[name]
    target = np.zeros((len(matrix), len(table.target)), bool)
    for label, image in table.mapping.items():
        target[:, table.target.index(image)] |= matrix[:, table.source.index(label)]
    return target, table.target.labels


def _write_phantom(films: Films, root: Path) -> None:
    """Written beside and renamed, so that a folder that exists is whole, and is left as it is."""
    if root.exists():
        return
    phantom = films.phantom
    beside = root.with_name(root.name + ".partial")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    rows = WRITERS[films.format](
        beside, films=phantom.films, seed=phantom.seed, size=phantom.size, workers=phantom.workers
    )
    write_traces(beside / TRACES, rows)
    os.replace(beside, root)


def draw_patients(patients: np.ndarray, films: int, *, seed: int) -> np.ndarray:
    """Rows of whole patients in random order until `films` of them are reached, the last patient cut: ascending."""
    if films > len(patients):
        raise ValueError(f"{films} films were asked for, the data set has {len(patients)}")
    names, owner = np.unique(patients, return_inverse=True)
    rank = np.random.default_rng(seed).permutation(len(names))[owner]
    return np.sort(np.argsort(rank, kind="stable")[:films])
