"""Writers of small invented sources in the user's own formats, for documentation and tests: films and rows.

The films are those of `phantoms`; the names of their labels are of nobody's archive.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from vlmalign.data.phantoms.institutions import NIH_LIKE
from vlmalign.data.phantoms.synthetic import Film, Study, plan_studies, write_films
from vlmalign.data.sources.schema import NIH14

#: finding -> what the invented hospital calls it; a film with none of these is "plain"
NAMES = {
    **dict.fromkeys(("Effusion", "Pleural_Thickening"), "basal veil"),
    **dict.fromkeys(("Mass", "Nodule"), "round shadow"),
    **dict.fromkeys(("Infiltration", "Consolidation", "Pneumonia", "Edema"), "soft cloud"),
    **dict.fromkeys(("Atelectasis", "Fibrosis", "Emphysema", "Pneumothorax"), "odd edge"),
}
PLAIN = "plain"


def write_table(
    folder: Path, *, films: int, seed: int = 0, size: int = 64, form: Literal["csv", "parquet"] = "csv"
) -> Path:
    """Writes `films.csv` (or .parquet) and `scans/*.png`; returns the table's path.

    Columns: file, person, direction (AP, PA), sex, age, findings (names joined by ";"), and part (train or test, by
    person).
    """
    studies = _studies(folder, films, seed, size)
    rows = [
        (
            name,
            f"P{study.patient:03d}",
            study.views[0],
            study.sex,
            study.age,
            "; ".join(_names(study)),
            "test" if study.patient % 4 == 3 else "train",
        )
        for name, study in studies.items()
    ]
    table = pd.DataFrame(rows, columns=["file", "person", "direction", "sex", "age", "findings", "part"])
    path = folder / f"films.{form}"
    if form == "csv":
        table.to_csv(path, index=False)
    else:
        table.to_parquet(path, index=False)
    return path


def write_conversations(
    folder: Path, *, rows: int, seed: int = 0, size: int = 64, form: Literal["jsonl", "parquet", "saved"] = "jsonl"
) -> Path:
    """Writes questions about invented films with their answers; returns the path of the file or folder.

    JSON Lines name files in `scans/`; in Parquet and in the folder saved by `datasets` the images are bytes in a column
    `images`. Each row has a column `patient`.
    """
    studies = _studies(folder, rows, seed, size)
    stored: list[dict[str, Any]] = []
    for name, study in studies.items():
        film = {"type": "image"} | ({"image": f"scans/{name}"} if form == "jsonl" else {})
        question = [film, {"type": "text", "text": "What is seen?"}]
        answer = [{"type": "text", "text": f"Seen: {', '.join(_names(study))}."}]
        row = {
            "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
            "patient": f"P{study.patient:03d}",
        }
        if form != "jsonl":
            row["images"] = [{"bytes": (folder / "scans" / name).read_bytes(), "path": name}]
        stored.append(row)
    if form == "jsonl":
        path = folder / "conversations.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in stored), encoding="utf-8")
        return path
    return _write_arrow(folder / "conversations", stored, form)


def _write_arrow(path: Path, rows: list[dict[str, Any]], form: str) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(rows)
    if form == "parquet":
        path = path.with_suffix(".parquet")
        pq.write_table(table, path, row_group_size=16)
        return path
    import datasets

    dataset = datasets.Dataset(table)
    dataset.cast_column("images", datasets.List(datasets.Image(decode=False))).save_to_disk(str(path))
    return path


def _studies(folder: Path, films: int, seed: int, size: int) -> dict[str, Study]:
    """Name of the image in `scans` -> its study, films written."""
    found = plan_studies({"": films}, NIH_LIKE, NIH14, seed=seed, laterals=False, films_per_study=1)
    studies = {f"{study.number:04d}.png": study for study in found}
    jobs = [Film(f"scans/{name}", study.case) for name, study in studies.items()]
    write_films(folder, jobs, NIH_LIKE.look, seed=seed, size=size)
    return studies


def _names(study: Study) -> list[str]:
    return list(dict.fromkeys(NAMES[label] for label in study.positives if label in NAMES)) or [PLAIN]
