"""The states that a finished stage keeps: its trained parameters as safetensors, known by their content."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from vlmalign.exchange import fetch, from_first
from vlmalign.studies.engine.files import Hashes
from vlmalign.studies.engine.record import read_record
from vlmalign.training.loop import Finished
from vlmalign.training.outcome import BEST, NEWEST, STATES

#: in a stage's folder, the reference's log-probabilities of preference pairs
REFERENCE = "reference"


def save_states(folder: Path, found: Finished) -> None:
    """Write `states/last.safetensors`, and `states/best.safetensors` where there is a best; all processes call this."""
    last = fetch(found.last)
    best = None if found.best is None else fetch(found.best)

    def write() -> None:
        partial = folder / f"{STATES}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(folder / STATES, ignore_errors=True)
        partial.mkdir()
        for which, params, step in (("last", last, found.step), ("best", best, found.best_step)):
            if params is not None:
                arrays = {name: np.ascontiguousarray(value) for name, value in params.items()}
                save_file(arrays, partial / f"{which}.safetensors", metadata={"step": str(step)})
        partial.rename(folder / STATES)

    from_first(write)


def state_ids(folder: Path, hashes: Hashes) -> dict[str, str]:
    """State -> SHA-256 of its file."""
    return {path.stem: hashes.of(path) for path in sorted((folder / STATES).glob("*.safetensors"))}


def read_state(folder: Path, which: str) -> dict[str, np.ndarray]:
    """The parameters of a state; every process reads the file.

    Raises:
        ValueError: when it is not there, or not as the stage's record says.
    """
    path = folder / STATES / f"{which}.safetensors"
    made, _ = read_record(folder)
    problem = "is missing" if not path.is_file() else None
    if problem is None:
        with path.open("rb") as file:  # what is read, whatever is remembered of the file
            if hashlib.file_digest(file, "sha256").hexdigest() != made["content"][which]:
                problem = "is not as it was written"
    if problem is not None:
        raise ValueError(f"{path} {problem}; restore it, or make the stage again with --redo {folder.name}")
    return load_file(path)


def shrink(folder: Path) -> None:
    """Remove what only an unfinished stage needs."""
    for name in (NEWEST, BEST, REFERENCE):
        shutil.rmtree(folder / name, ignore_errors=True)
