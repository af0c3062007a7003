"""MIMIC-CXR-JPG 2.0.0 and 2.1.0: a reader, and a writer of an invented data set in the same format.

The real data set is credentialed. Tree: `files/p10/p10000032/s50414267/<dicom_id>.jpg`; tables
`mimic-cxr-<version>-{metadata,split,chexpert,negbio}.csv.gz` in the root. Labels are per study.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from vlmalign.data.phantoms.institutions import MIMIC_LIKE, Institution
from vlmalign.data.phantoms.synthetic import (
    Film,
    Study,
    plan_studies,
    split_counts,
    truth_row,
    write_films,
    write_truth,
)
from vlmalign.data.sources.films import Films
from vlmalign.data.sources.schema import CHEXPERT
from vlmalign.data.sources.tables import filter_words, find_table, ignored, label_values, positives, read_table
from vlmalign.quoting import quoted, shown

VERSIONS = ("2.1.0", "2.0.0")
SPLITS = ("train", "validate", "test")
LABELERS = ("chexpert", "negbio")
METADATA = (
    "dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription", "ViewPosition", "Rows", "Columns",
    "StudyDate", "StudyTime", "ProcedureCodeSequence_CodeMeaning", "ViewCodeSequence_CodeMeaning",
    "PatientOrientationCodeSequence_CodeMeaning",
)  # fmt: skip


class MimicCxrJpg(Films):
    """The films of one split (None: all) with the given views, labelled per study; ids are dicom ids.

    Only the value 1 is positive; -1 counts as `uncertain` says (`settings.Uncertain`); 0 and blank are absent. Studies without a row in
    the label table are left out and listed in `skipped`. Without `version` the newest one present is read.

    MIMIC-CXR says neither age nor sex. `patients` is MIMIC-IV's `patients.csv` (or .gz), which has the same subjects: sex
    is its `gender`, age at the film `anchor_age` + year of the film - `anchor_year`. A subject who is not in it has none.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = "train",
        *,
        views: Sequence[str] = ("AP", "PA"),
        labeler: str = "chexpert",
        uncertain: str = "negative",
        version: str | None = None,
        patients: str | Path | None = None,
        on_bad: str = "error",
    ) -> None:
        root = Path(root)
        if split is not None and split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)} or None, found {split!r}")
        if labeler not in LABELERS:
            raise ValueError(f"labeler must be one of {', '.join(LABELERS)}, found {labeler!r}")
        version = version or find_version(root)
        prefix = f"mimic-cxr-{version}"
        meta_path = find_table(root, f"{prefix}-metadata.csv")
        label_path = find_table(root, f"{prefix}-{labeler}.csv")
        split_path = find_table(root, f"{prefix}-split.csv")

        dated = () if patients is None else ("StudyDate",)
        films = read_table(meta_path, ("dicom_id", "subject_id", "study_id", "ViewPosition", *dated))
        films["row"] = np.arange(len(films)) + 2
        found = films["ViewPosition"]
        films = films[films["ViewPosition"].isin(list(views))]
        films["split"] = films["dicom_id"].map(_splits(split_path))
        without = films[films["split"].isna()]
        if len(without):
            raise ValueError(
                f"{split_path}: no row for {len(without)} films of {meta_path}, first {shown(without.iloc[0, 0])}"
            )
        if split is not None:
            films = films[films["split"] == split]

        labels = read_table(label_path, ("subject_id", "study_id", *CHEXPERT.labels), closed=True)
        repeated = labels["study_id"][labels["study_id"].duplicated()]
        if len(repeated):
            raise ValueError(f"{label_path}, row {repeated.index[0] + 2}: study {shown(repeated.iloc[0])} is repeated")
        values = label_values(labels, label_path, CHEXPERT.labels)
        matrix, doubtful = positives(values, uncertain), ignored(values, uncertain)
        row_of = pd.Index(labels["study_id"]).get_indexer(films["study_id"])  # -1: no label row
        paths = [
            f"files/p{subject[:2]}/p{subject}/s{study}/{dicom}.jpg"
            for subject, study, dicom in zip(films["subject_id"], films["study_id"], films["dicom_id"], strict=True)
        ]
        films = films.assign(path=paths)
        unlabelled = films[row_of < 0]
        films = films[row_of >= 0]
        super().__init__(
            "mimic-cxr-jpg",
            CHEXPERT,
            root,
            table=meta_path,
            ids=films["dicom_id"],
            patients=films["subject_id"],
            paths=films["path"],
            labels=matrix[row_of[row_of >= 0]],
            rows=films["row"].to_numpy(int),
            meta={
                "study": films["study_id"],
                "view": films["ViewPosition"],
                "split": films["split"],
                **({} if patients is None else _sex_and_age(Path(patients), films, meta_path)),
            },
            skipped=[
                {"id": id, "path": path, "reason": f"study {shown(study)} has no row in {label_path.name}"}
                for id, path, study in unlabelled[["dicom_id", "path", "study_id"]].itertuples(index=False)
            ],
            on_bad=on_bad,
            files=(meta_path, label_path, split_path, *(() if patients is None else (Path(patients),))),
            wanted=filter_words(split, views, found),
            ignored=doubtful[row_of[row_of >= 0]],
        )


#: the time of writing stays out of a gzip file, so that an invented set is the same to the byte whenever it is made
WITHOUT_TIME = {"method": "gzip", "mtime": 0}


def find_version(root: Path) -> str:
    """The newest version whose metadata table is in `root`; FileNotFoundError when there is none."""
    table = find_table(Path(root), *(f"mimic-cxr-{version}-metadata.csv" for version in VERSIONS))
    return re.match(r"mimic-cxr-([\d.]+)-metadata", table.name)[1]


def _sex_and_age(path: Path, films: pd.DataFrame, table: Path) -> dict[str, np.ndarray]:
    """Columns "sex" and "age" (years, text) of the films, None where the subject is not in MIMIC-IV's table of patients."""
    known = read_table(path, ("subject_id", "gender", "anchor_age", "anchor_year"))
    people = {row[0]: row[1:] for row in known[["subject_id", "gender", "anchor_age", "anchor_year"]].to_numpy()}
    sex, age = np.full((2, len(films)), None, object)
    for i, (subject, date, row) in enumerate(zip(films["subject_id"], films["StudyDate"], films["row"], strict=True)):
        if subject in people:
            sex[i], anchor_age, anchor_year = people[subject]
            try:
                age[i] = str(int(anchor_age) + int(date[:4]) - int(anchor_year))
            except ValueError:
                raise ValueError(
                    f"subject {subject}: expected whole numbers in anchor_age and anchor_year of {path} and a date such as "
                    f"21800506 in {table}, row {row}, found {anchor_age!r}, {anchor_year!r} and {date!r}"
                ) from None
    return {"sex": sex, "age": age}


def _splits(path: Path) -> dict[str, str]:
    table = read_table(path, ("dicom_id", "study_id", "subject_id", "split"))
    unknown = table[~table["split"].isin(SPLITS)]
    if len(unknown):
        row, value = unknown.index[0] + 2, unknown["split"].iloc[0]
        raise ValueError(
            f"{path}, row {row}, column 'split': found {quoted(value)}, expected one of {', '.join(SPLITS)}"
        )
    return dict(zip(table["dicom_id"], table["split"], strict=True))


def write_synthetic(
    root: str | Path,
    *,
    films: int | Mapping[str, int],
    seed: int,
    size: int = 128,
    workers: int = 1,
    institution: Institution = MIMIC_LIKE,
    version: str = "2.0.0",
) -> list[dict]:
    """An invented MIMIC-CXR-JPG under `root`; returns the rows of its `truth.jsonl`.

    `films` counts AP and PA films: a total (80 / 10 / 10 %) or one number per split. Laterals and films with a
    blank view come on top. Files are `size` x `size` px JPEG and depend on `seed` alone.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    counts = split_counts(films, {"train": 0.8, "validate": 0.1, "test": 0.1})
    studies = plan_studies(counts, institution, CHEXPERT, seed=seed, laterals=True)
    rng = np.random.default_rng([seed, 4])
    subjects = 10_000_000 + rng.choice(10_000_000, size=1 + studies[-1].patient, replace=False)
    numbers = 50_000_000 + rng.choice(10_000_000, size=len(studies), replace=False)
    metadata, splits, jobs, truth = [], [], [], []
    for study in studies:
        subject, number = int(subjects[study.patient]), int(numbers[study.number])
        for view in study.views:
            dicom = "-".join(f"{part:08x}" for part in rng.integers(2**32, size=5))
            metadata.append(_metadata_row(dicom, subject, number, view, study, size))
            splits.append((dicom, number, subject, study.split))
            path = f"files/p{subject // 1_000_000}/p{subject}/s{number}/{dicom}.jpg"
            jobs.append(Film(path, study.case, lateral=view == "LATERAL"))
            if view in ("AP", "PA"):
                truth.append(truth_row(dicom, study, institution))

    prefix = f"{root}/mimic-cxr-{version}"
    alphabetical = sorted(CHEXPERT.labels)
    labels = pd.DataFrame(
        [
            (subjects[study.patient], numbers[study.number], *(study.labels[label] for label in alphabetical))
            for study in studies
        ],
        columns=["subject_id", "study_id", *alphabetical],
    ).astype(dict.fromkeys(alphabetical, float))
    pd.DataFrame(metadata, columns=METADATA).to_csv(f"{prefix}-metadata.csv.gz", index=False, compression=WITHOUT_TIME)
    pd.DataFrame(splits, columns=["dicom_id", "study_id", "subject_id", "split"]).to_csv(
        f"{prefix}-split.csv.gz", index=False, compression=WITHOUT_TIME
    )
    for labeler in LABELERS:
        labels.to_csv(f"{prefix}-{labeler}.csv.gz", index=False, compression=WITHOUT_TIME)
    write_films(root, jobs, institution.look, seed=seed, size=size, workers=workers)
    write_truth(root, truth)
    return truth


def _metadata_row(dicom: str, subject: int, number: int, view: str, study: Study, size: int) -> tuple:
    procedure = "CHEST (PA AND LAT)" if "LATERAL" in study.views else "CHEST (SINGLE VIEW)"
    code = {"AP": "antero-posterior", "PA": "postero-anterior", "LATERAL": "lateral"}.get(view, "")
    date = 21_800_101 + 10_000 * study.visit + study.patient % 28
    return (
        dicom, subject, number, procedure, view, size, size, date, 120000.5, procedure.title(), code,
        "Erect" if code else "",
    )  # fmt: skip
