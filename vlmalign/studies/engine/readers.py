"""Human readers of the CheXpert test studies as a yardstick of a report: `readers.json` in the run folder.

Their scores follow from the released labels alone. They are computed once, and again when the labels are others.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmalign.evaluation.human_readers import read_readings, score_readers
from vlmalign.studies.engine.files import Hashes, read_json, write_json

READERS = "readers.json"


def write_readers(run: Path, folder: Path | None, hashes: Hashes) -> None:
    """Score the readers of the released labels in `folder`; without one, nothing of an earlier start is left.

    Raises:
        FileNotFoundError, ValueError: for a folder that does not hold the labels as released.
    """
    path = run / READERS
    if folder is None:
        path.unlink(missing_ok=True)
        return
    labels = hashes.of_folder(folder)
    if path.exists() and read_json(path, {"labels": str})["labels"] == labels:
        return
    readings = read_readings(folder)
    found: dict[str, Any] = {"labels": labels, "studies": len(readings.studies), "readers": score_readers(readings)}
    write_json(path, found)
