"""CheXpert: a reader of its train, valid and expert-labelled test sets, and a writer of an invented one.

`train.csv` and `valid.csv` have one row per image; `groundtruth.csv` (test) has one row per study and names no
image, so the frontal films are found on disk. Paths in the tables begin with the release's folder
(`CheXpert-v1.0/` or `CheXpert-v1.0-small/`); the root may be that folder or the one that holds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vlmalign.data.phantoms.institutions import CHEXPERT_LIKE, Institution
from vlmalign.data.phantoms.synthetic import Film, plan_studies, split_counts, truth_row, write_films, write_truth
from vlmalign.data.sources.films import Films
from vlmalign.data.sources.schema import CHEXPERT
from vlmalign.data.sources.tables import filter_words, find_table, ignored, inside, label_values, positives, read_table
from vlmalign.quoting import quoted

RELEASES = ("CheXpert-v1.0", "CheXpert-v1.0-small")
COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA")
_TABLES = {"train": "train.csv", "valid": "valid.csv", "test": "groundtruth.csv"}
_PATH = re.compile(r"(?:[^/]+/)*?((?:train|valid|test)/(patient\d+)/(study\d+)(?:/[^/]+)?)")


class CheXpert(Films):
    """The films of one split; ids are paths from the split's folder on (`train/patient00001/study1/...jpg`).

    With `frontal_only` laterals are left out (the test table lists studies: there only frontal films are read); `views`
    are values of the column `AP/PA` (None: all), which the test table lacks.
    Only the value 1 is positive; -1 counts as `uncertain` says (`settings.Uncertain`); 0 and blank are absent. Test studies without a
    frontal film on disk raise FileNotFoundError, or are listed in `skipped` with `on_bad="skip"`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "train",
        *,
        frontal_only: bool = True,
        views: Sequence[str] | None = None,
        uncertain: str = "negative",
        on_bad: str = "error",
    ) -> None:
        if split not in _TABLES:
            raise ValueError(f"split must be one of {', '.join(_TABLES)}, found {split!r}")
        base = _base(Path(root), _TABLES[split])
        table = find_table(base, _TABLES[split])
        read = _study_rows if split == "test" else _image_rows
        films, skipped = read(base, table, frontal_only, on_bad)
        found = films.get("AP/PA")
        if views is not None:
            if found is None:
                raise ValueError(f"{table} has no column 'AP/PA': views cannot be chosen in split {split!r}")
            films = films[found.isin(list(views))]
        values = label_values(films, table, CHEXPERT.labels)
        super().__init__(
            "chexpert",
            CHEXPERT,
            base,
            table=table,
            ids=films["path"],
            patients=films["patient"],
            paths=films["path"],
            labels=positives(values, uncertain),
            rows=films["row"].to_numpy(int),
            meta={
                name: films[column]
                for name, column in (("study", "study"), ("view", "AP/PA"), ("sex", "Sex"), ("age", "Age"))
                if column in films
            },
            skipped=skipped,
            on_bad=on_bad,
            wanted=filter_words(split, views, found) + (", frontal views only" if frontal_only else ""),
            ignored=ignored(values, uncertain),
        )


def read_study_table(table: str | Path) -> pd.DataFrame:
    """`groundtruth.csv` without any image: columns path, patient, study, row and the 14 labels as text."""
    frame = read_table(Path(table), ("Study", *CHEXPERT.labels), closed=True)
    label_values(frame, Path(table), CHEXPERT.labels)
    return _with_parts(frame, frame["Study"], Path(table))


def _base(root: Path, table: str) -> Path:
    for base in (root, *(root / release for release in RELEASES)):
        if (base / table).is_file() or (base / f"{table}.gz").is_file():
            return base
    return root


def _with_parts(frame: pd.DataFrame, paths: pd.Series, table: Path) -> pd.DataFrame:
    """Adds path (from the split's folder on), patient, study and row; ValueError for a path of another form."""
    parts = paths.str.extract(f"^{_PATH.pattern}$")
    odd = parts[0].isna()
    if odd.any():
        row = int(odd.to_numpy().argmax())
        raise ValueError(
            f"{table}, row {row + 2}, column {paths.name!r}: found {quoted(paths.iloc[row])}, expected a path inside the "
            "data root such as CheXpert-v1.0/train/patient00001/study1/view1_frontal.jpg"
        )
    study = parts[1] + "/" + parts[2]
    return frame.assign(path=parts[0], patient=parts[1], study=study, row=np.arange(len(frame)) + 2)


def _image_rows(base: Path, table: Path, frontal_only: bool, on_bad: str) -> tuple[pd.DataFrame, list]:
    del base, on_bad
    frame = read_table(table, (*COLUMNS, *CHEXPERT.labels), closed=True)
    frame = _with_parts(frame, frame["Path"], table)
    label_values(frame, table, CHEXPERT.labels)
    odd = ~frame["Frontal/Lateral"].isin(["Frontal", "Lateral"])
    if odd.any():
        row = int(odd.to_numpy().argmax())
        found = frame["Frontal/Lateral"].iloc[row]
        raise ValueError(
            f"{table}, row {row + 2}, column 'Frontal/Lateral': found {quoted(found)}, expected Frontal or Lateral"
        )
    return (frame[frame["Frontal/Lateral"] == "Frontal"] if frontal_only else frame), []


def _study_rows(base: Path, table: Path, frontal_only: bool, on_bad: str) -> tuple[pd.DataFrame, list]:
    del frontal_only
    frame = read_study_table(table)
    films, skipped = [], []
    for position, (study, row) in enumerate(zip(frame["path"], frame["row"], strict=True)):
        names = sorted(path.name for path in inside(base, study).glob("view*_frontal.jpg"))
        if not names:
            reason = f"{table}, row {row}: no view*_frontal.jpg in {base / study}"
            if on_bad != "skip":
                raise FileNotFoundError(f"{reason}; restore it or open with on_bad='skip'")
            skipped.append({"id": study, "path": study, "reason": reason})
        films += [(position, f"{study}/{name}") for name in names]
    rows = frame.iloc[[position for position, _ in films]]
    return rows.assign(path=[path for _, path in films]), skipped


def write_synthetic(
    root: str | Path,
    *,
    films: int | Mapping[str, int],
    seed: int,
    size: int = 128,
    workers: int = 1,
    institution: Institution = CHEXPERT_LIKE,
    release: str = "CheXpert-v1.0-small",
) -> list[dict]:
    """An invented CheXpert release in `root`; returns the rows of its `truth.jsonl`.

    `films` counts frontal films: a total (80 / 10 / 10 %) or one number for each of train, valid, test. Laterals
    come on top. Files are `size` x `size` px JPEG and depend on `seed` alone.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    counts = split_counts(films, {"train": 0.8, "valid": 0.1, "test": 0.1})
    studies = plan_studies(counts, institution, CHEXPERT, seed=seed, laterals=True)
    rows: dict[str, list[tuple]] = {"train": [], "valid": [], "test": []}
    jobs, truth = [], []
    for study in studies:
        folder = f"{study.split}/patient{study.patient + 1:05d}/study{study.visit + 1}"
        values = [study.labels[label] for label in CHEXPERT.labels]
        if study.split == "test":
            rows["test"].append((f"CheXpert-v1.0/{folder}", *(int(value == 1) for value in values)))
        # Films without a named view belong to MIMIC's format only.
        for number, view in enumerate((view for view in study.views if view), start=1):
            lateral = view == "LATERAL"
            path = f"{folder}/view{number}_{'lateral' if lateral else 'frontal'}.jpg"
            jobs.append(Film(path, study.case, lateral))
            if study.split != "test":
                sex = {"M": "Male", "F": "Female"}[study.sex]
                side = ("Lateral", None) if lateral else ("Frontal", view)
                rows[study.split].append((f"{release}/{path}", sex, study.age, *side, *values))
            if not lateral:
                truth.append(truth_row(path, study, institution))
    for split in ("train", "valid"):
        table = pd.DataFrame(rows[split], columns=[*COLUMNS, *CHEXPERT.labels])
        table.astype(dict.fromkeys(CHEXPERT.labels, float)).to_csv(root / f"{split}.csv", index=False)
    pd.DataFrame(rows["test"], columns=["Study", *CHEXPERT.labels]).to_csv(root / "groundtruth.csv", index=False)
    write_films(root, jobs, institution.look, seed=seed, size=size, workers=workers)
    write_truth(root, truth)
    return truth
