"""NIH ChestX-ray14: readers of the full release and of small extracts, and writers of invented ones.

`Data_Entry_2017_v2020.csv` has one row per image, its findings joined by `|`; the commas inside the bracketed
column names split those names in two. Images lie in `images_001/images/` ... `images_012/images/` or flat in
`images/`; the official splits are `train_val_list.txt` and `test_list.txt`. Attribute to Wang et al., CVPR 2017.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vlmalign.data.phantoms.institutions import NIH_LIKE, Institution
from vlmalign.data.phantoms.synthetic import (
    Film,
    Study,
    boxes_of,
    plan_studies,
    split_counts,
    truth_row,
    write_films,
    write_truth,
)
from vlmalign.data.sources.films import Films
from vlmalign.data.sources.nih_boxes import BOXED, BOXES, FindingBox, write_boxes
from vlmalign.data.sources.nih_table import COLUMNS, OLDER_TABLE, TABLE, NihTable, finding_matrix, read_nih_table
from vlmalign.data.sources.schema import NIH14
from vlmalign.data.sources.tables import filter_words, find_table, read_table
from vlmalign.quoting import quoted, shown

__all__ = ["Nih14", "NihExtract", "NihTable", "read_nih_table", "write_synthetic", "write_synthetic_extract"]

#: the first four are required
EXTRACT_COLUMNS = ("path", "image_index", "finding_labels", "patient_id", "age", "gender", "view")
SPLITS = {"train_val": "train_val_list.txt", "test": "test_list.txt"}


class Nih14(Films):
    """The films of an official split (None: all rows); ids are image indices.

    With `views` only those of "AP", "PA" are kept. The image folders are listed once when the data set is opened
    (no file is looked at singly), so a film that is missing from them is found then: FileNotFoundError naming row
    and film, or listed in `skipped` with `on_bad="skip"`.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        *,
        views: Sequence[str] | None = None,
        on_bad: str = "error",
    ) -> None:
        root = Path(root)
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or None, found {split!r}")
        table = read_nih_table(find_table(root, TABLE, OLDER_TABLE))
        frame = table.frame
        keep = np.ones(len(frame), bool)
        files = [table.path]
        if split is not None:
            files.append(root / SPLITS[split])
            keep &= frame["Image Index"].isin(_split_ids(files[-1], table)).to_numpy()
        if views is not None:
            keep &= frame["View Position"].isin(list(views)).to_numpy()
        folders = _image_folders(root)
        # A row without a file gets the flat place, so that a path such as ../x.png still meets the path check.
        paths = np.array([f"{folders.get(id, 'images')}/{id}" for id in table.ids], object)
        missing = keep & np.array([id not in folders and ".." not in id and "/" not in id for id in table.ids], bool)
        skipped = []
        for i in np.flatnonzero(missing):
            reason = f"{table.path}, row {i + 2}: {shown(table.ids[i])} is in no image folder of {root}"
            if on_bad != "skip":
                raise FileNotFoundError(f"{reason} ({missing.sum()} missing); restore it or open with on_bad='skip'")
            skipped.append({"id": table.ids[i], "path": paths[i], "reason": reason})
        keep &= ~missing
        frame = frame[keep]
        super().__init__(
            "nih-cxr14",
            NIH14,
            root,
            table=table.path,
            ids=table.ids[keep],
            patients=table.patients[keep],
            paths=paths[keep],
            labels=table.labels[keep],
            rows=np.flatnonzero(keep) + 2,
            meta={
                "view": frame["View Position"],
                "sex": frame["Patient Gender"],
                "age": frame["Patient Age"],
                "follow_up": frame["Follow-up #"],
            },
            skipped=skipped,
            on_bad=on_bad,
            files=files,
            wanted=filter_words(split, views, table.frame["View Position"]),
        )


class NihExtract(Films):
    """A small extract: a folder of films with a `labels.csv` that gives each film's path, findings and patient.

    Columns: path, image_index, finding_labels, patient_id, and where they are there age, gender and view. Others are
    ignored, a `split` column too: extracts have been divided by film, so divide by `patients()` instead.
    """

    def __init__(self, root: str | Path, *, views: Sequence[str] | None = None, on_bad: str = "error") -> None:
        table = find_table(Path(root), "labels.csv")
        frame = read_table(table, (*EXTRACT_COLUMNS[:4], *(("view",) if views is not None else ())))
        labels = finding_matrix(frame["finding_labels"], table)
        keep = np.ones(len(frame), bool) if views is None else frame["view"].isin(list(views)).to_numpy()
        found = frame.get("view")
        frame = frame[keep]
        super().__init__(
            "nih-extract",
            NIH14,
            Path(root),
            table=table,
            ids=frame["image_index"],
            patients=frame["patient_id"],
            paths=frame["path"],
            labels=labels[keep],
            rows=np.flatnonzero(keep) + 2,
            meta={
                name: frame[column]
                for name, column in (("view", "view"), ("sex", "gender"), ("age", "age"))
                if column in frame
            },
            on_bad=on_bad,
            wanted=filter_words(None, views, found),
        )


def _split_ids(path: Path, table: NihTable) -> set[str]:
    """The image indices of a split list; ValueError for one that the table does not have."""
    try:
        ids = path.read_text(encoding="utf-8-sig").split()
    except FileNotFoundError:
        raise FileNotFoundError(f"no split list {path}; open with split=None to read every row") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected one file name a line, found bytes that are not UTF-8 ({error})") from None
    known = set(table.ids)
    unknown = [id for id in ids if id not in known]
    if unknown:
        raise ValueError(
            f"{path}: {len(unknown)} of its {len(ids)} names are not in {table.path.name}, the first {quoted(unknown[0])}; "
            f"expected image indices as the table writes them, such as {quoted(table.ids[0])}"
        )
    return set(ids)


def _image_folders(root: Path) -> dict[str, str]:
    """File name -> folder relative to `root`, for every file in the image folders."""
    places = [f"images_{number:03d}/images" for number in range(1, 13)] + ["images"]
    present = [place for place in places if (root / place).is_dir()]
    if not present:
        raise FileNotFoundError(
            f"no images_001/images ... images_012/images and no images/ in {root}; to use the labels alone call "
            "read_nih_table"
        )
    return {name: place for place in present for name in os.listdir(root / place)}


def write_synthetic(
    root: str | Path,
    *,
    films: int | Mapping[str, int],
    seed: int,
    size: int = 128,
    workers: int = 1,
    institution: Institution = NIH_LIKE,
) -> list[dict]:
    """An invented ChestX-ray14 in `root`; returns the rows of its `truth.jsonl`. Test films have boxes, as in the release.

    `films` is a total (80 / 20 %) or one number for each of train_val, test. Files are `size` x `size` px grey PNG,
    1,000 to a folder, and depend on `seed` alone.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    counts = split_counts(films, {"train_val": 0.8, "test": 0.2})
    studies = plan_studies(counts, institution, NIH14, seed=seed, laterals=False, films_per_study=1)
    rows, jobs, truth = [], [], []
    for i, study in enumerate(studies):
        id = _image_index(study)
        findings = "|".join(study.positives)
        rows.append(
            (
                id,
                findings,
                study.visit,
                study.patient + 1,
                study.age,
                study.sex,
                study.views[0],
                size,
                size,
                0.143,
                0.143,
            )
        )
        jobs.append(Film(f"images_{1 + i // 1000:03d}/images/{id}", study.case))
        truth.append(truth_row(id, study, institution))
    # Written by hand: the real header does not quote the commas in its brackets.
    header = ",".join(COLUMNS)
    lines = [",".join(str(value) for value in row) for row in rows]
    (root / TABLE).write_text("\n".join([header, *lines]) + "\n")
    for split, name in SPLITS.items():
        ids = [_image_index(study) for study in studies if study.split == split]
        (root / name).write_text("".join(f"{id}\n" for id in ids))
    write_boxes(
        root / BOXES,
        [
            FindingBox(_image_index(study), label, *place)
            for film, study in enumerate(studies)
            if study.split == "test"
            for label, place in boxes_of(study.case, institution, film, seed=seed, size=size)
            if label in BOXED
        ],
    )
    write_films(root, jobs, institution.look, seed=seed, size=size, workers=workers)
    write_truth(root, truth)
    return truth


def write_synthetic_extract(
    root: str | Path,
    *,
    films: int,
    seed: int,
    size: int = 64,
    workers: int = 1,
    institution: Institution = NIH_LIKE,
) -> list[dict]:
    """An invented extract (`labels.csv` and `films/*.png`) in `root`; returns the rows of its `truth.jsonl`."""
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    studies = plan_studies({"": films}, institution, NIH14, seed=seed, laterals=False, films_per_study=1)
    rows = []
    for study in studies:
        id = _image_index(study)
        findings = "|".join(study.positives)
        rows.append((f"films/{id}", id, findings, study.patient + 1, study.age, study.sex, study.views[0]))
    table = pd.DataFrame(rows, columns=EXTRACT_COLUMNS)
    table.to_csv(root / "labels.csv", index=False)
    jobs = [Film(path, study.case) for path, study in zip(table["path"], studies, strict=True)]
    write_films(root, jobs, institution.look, seed=seed, size=size, workers=workers)
    truth = [truth_row(_image_index(study), study, institution) for study in studies]
    write_truth(root, truth)
    return truth


def _image_index(study: Study) -> str:
    return f"{study.patient + 1:08d}_{study.visit:03d}.png"
