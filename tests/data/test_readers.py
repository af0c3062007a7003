"""Readers and writers of each format: exact columns and paths, round trips, every bad input, and the real tables.

The real files lie beside the project (`../shared/data`); tests that need them skip where they are absent.
"""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vlmalign.data.films.images import load_image
from vlmalign.data.phantoms.institutions import BASE, NIH_LIKE
from vlmalign.data.sources.chexpert import CheXpert, read_study_table
from vlmalign.data.sources.formats import SOURCES
from vlmalign.data.sources.mimic import MimicCxrJpg
from vlmalign.data.sources.nih import Nih14, NihExtract, read_nih_table
from vlmalign.data.sources.schema import CHEXPERT, NIH14
from vlmalign.data.sources.tables import inside, label_values, read_table
from vlmalign.data.sources.xray import Archive

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
WRITERS = {kind: source.write for kind, source in SOURCES.items() if issubclass(source, Archive)}
MIMIC_TABLES = ("metadata", "split", "chexpert", "negbio")


def _opened(kind, root, **options):
    return SOURCES[kind](kind=kind, root=root, **options).open(Path)


def _real(*parts):
    path = REAL.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the real file {'/'.join(parts)} is not beside the project")
    return path


@pytest.fixture
def mimic(tmp_path):
    WRITERS["mimic-cxr-jpg"](tmp_path, films={"train": 30, "validate": 4, "test": 6}, seed=7, size=32)
    return tmp_path


@pytest.fixture
def chexpert(tmp_path):
    WRITERS["chexpert"](tmp_path, films={"train": 20, "valid": 5, "test": 8}, seed=7, size=32)
    return tmp_path


@pytest.fixture
def nih(tmp_path):
    WRITERS["nih-cxr14"](tmp_path, films={"train_val": 20, "test": 6}, seed=7, size=32)
    return tmp_path


def _header(path):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", newline="") as file:
        return file.readline().strip()


def _edit(path, change):
    """Rewrites a table (kept as text) by `change(frame) -> frame or None`."""
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    changed = change(frame)
    (frame if changed is None else changed).to_csv(path, index=False)


def _truth(root):
    return {row["id"]: row for row in map(json.loads, (root / "truth.jsonl").open())}


# ---- every format -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", WRITERS)
def test_what_is_written_is_read(tmp_path, format):
    rows = WRITERS[format](tmp_path, films=40, seed=3, size=32)
    films = _opened(format, tmp_path)
    truth = _truth(tmp_path)
    assert len(rows) == len(truth) == 40
    assert films.skipped == []
    assert films.label_matrix().shape == (len(films), len(films.schema))
    assert films.patients().shape == films.ids().shape == (len(films),)
    for i, example in enumerate(films):
        assert list(example.labels) == truth[example.id]["labels"]
        assert example.patient == films.patients()[i]
        assert example.labels == tuple(np.array(films.schema.labels)[films.label_matrix()[i]])
        assert load_image(example.image).shape == (32, 32, 3)
    assert films[-1] == films[len(films) - 1]
    with pytest.raises(IndexError, match=f"it has {len(films)} films"):
        films[len(films)]


@pytest.mark.parametrize("format", ["mimic-cxr-jpg", "nih-cxr14"])
def test_the_seed_alone_decides_the_files(tmp_path, format):
    def contents(folder):
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        read = {str(p.relative_to(folder)): p.read_bytes() for p in files if p.suffix != ".gz"}
        return read | {p.name: gzip.decompress(p.read_bytes()) for p in files if p.suffix == ".gz"}

    for name, seed, workers in (("one", 5, 1), ("two", 5, 2), ("other", 6, 1)):
        WRITERS[format](tmp_path / name, films=20, seed=seed, size=32, workers=workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") != contents(tmp_path / "other")


def test_no_patient_is_in_two_splits_and_some_have_several_films(tmp_path):
    WRITERS["mimic-cxr-jpg"](tmp_path, films=120, seed=1, size=16)
    patients = [set(MimicCxrJpg(tmp_path, split).patients()) for split in ("train", "validate", "test")]
    assert sum(map(len, patients)) == len(set.union(*patients)) < 120


def test_unknown_folders_and_options_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        _opened("chexpert", tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"metadata\.csv\.gz.*check that the root"):
        _opened("mimic-cxr-jpg", tmp_path)
    with pytest.raises(ValueError, match=r"validate.*'valid'"):
        MimicCxrJpg(tmp_path, split="valid")
    with pytest.raises(ValueError, match="chexpert labels, nih-like gives nih14"):
        WRITERS["mimic-cxr-jpg"](tmp_path, films=3, seed=0, institution=NIH_LIKE)
    with pytest.raises(ValueError, match="unknown splits"):
        WRITERS["chexpert"](tmp_path, films={"validate": 3}, seed=0)
    with pytest.raises(ValueError, match="at least 1"):
        WRITERS["chexpert"](tmp_path, films=0, seed=0)


def test_this_room_imports_no_jax():
    code = "import sys, vlmalign.data.sources.formats, vlmalign.data.phantoms.traces; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---- MIMIC-CXR-JPG ----------------------------------------------------------------------------------------------


def test_mimic_files_have_the_released_form(mimic):
    assert sorted(path.name for path in mimic.iterdir()) == sorted(
        ["files", "truth.jsonl", *(f"mimic-cxr-2.0.0-{name}.csv.gz" for name in MIMIC_TABLES)]
    )
    assert _header(mimic / "mimic-cxr-2.0.0-metadata.csv.gz") == (
        "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,StudyTime,"
        "ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning"
    )
    assert _header(mimic / "mimic-cxr-2.0.0-split.csv.gz") == "dicom_id,study_id,subject_id,split"
    for labeler in ("chexpert", "negbio"):
        header = _header(mimic / f"mimic-cxr-2.0.0-{labeler}.csv.gz")
        assert header == "subject_id,study_id," + ",".join(sorted(CHEXPERT.labels))
    labels = pd.read_csv(mimic / "mimic-cxr-2.0.0-chexpert.csv.gz", dtype=str, keep_default_na=False)
    assert set(labels.iloc[:, 2:].to_numpy().ravel()) <= {"1.0", "0.0", "-1.0", ""}
    assert set(labels["No Finding"]) == {"1.0", ""}
    for path in (mimic / "files").rglob("*.jpg"):
        group, subject, study, dicom = path.relative_to(mimic / "files").parts
        assert group == subject[:3]
        assert subject.startswith("p1")
        assert study.startswith("s5")
        assert [len(part) for part in dicom.removesuffix(".jpg").split("-")] == [8] * 5
        assert Image.open(path).mode == "L"


def test_mimic_views_splits_versions_and_labelers(mimic, tmp_path_factory):
    assert [len(MimicCxrJpg(mimic, split)) for split in ("train", "validate", "test", None)] == [30, 4, 6, 40]
    every = pd.read_csv(mimic / "mimic-cxr-2.0.0-metadata.csv.gz")["ViewPosition"].fillna("")
    assert set(every) == {"AP", "PA", "LATERAL", ""}
    assert len(MimicCxrJpg(mimic, None, views=("LATERAL",))) == (every == "LATERAL").sum()
    assert {film.meta["view"] for film in MimicCxrJpg(mimic)} == {"AP", "PA"}
    assert (MimicCxrJpg(mimic, labeler="negbio").label_matrix() == MimicCxrJpg(mimic).label_matrix()).all()
    newer = tmp_path_factory.mktemp("newer")
    WRITERS["mimic-cxr-jpg"](newer, films=4, seed=1, size=16, version="2.1.0", institution=BASE)
    assert MimicCxrJpg(newer, None).table.name == "mimic-cxr-2.1.0-metadata.csv.gz"
    with pytest.raises(ValueError, match="labeler"):
        MimicCxrJpg(mimic, labeler="gpt")


def test_mimic_only_one_is_positive_and_labels_are_joined_by_study(mimic):
    table = mimic / "mimic-cxr-2.0.0-chexpert.csv.gz"

    def change(frame):
        frame.loc[0, list(CHEXPERT.labels)] = ""
        frame.loc[0, ["Edema", "Fracture", "Lung Lesion", "Lung Opacity"]] = ["1.0", "-1.0", "0.0", "1.0"]
        return frame.iloc[::-1]

    study = pd.read_csv(table, dtype=str)["study_id"][0]
    _edit(table, change)
    found = [film.labels for film in MimicCxrJpg(mimic, None) if film.meta["study"] == study]
    assert set(found) == {("Lung Opacity", "Edema")}
    found = [film.labels for film in MimicCxrJpg(mimic, None, uncertain="positive") if film.meta["study"] == study]
    assert set(found) == {("Lung Opacity", "Edema", "Fracture")}
    every, certain = MimicCxrJpg(mimic, None), MimicCxrJpg(mimic, None, uncertain="ignore")
    assert not [film for film in certain if film.meta["study"] == study]
    doubtful = {film.id for film in every} - {film.id for film in certain}
    assert {row["id"] for row in certain.skipped} == doubtful
    assert all(row["reason"].startswith("uncertain: ") for row in certain.skipped)
    assert "uncertain: Fracture" in {row["reason"] for row in certain.skipped}
    with pytest.raises(ValueError, match="'maybe'"):
        MimicCxrJpg(mimic, None, uncertain="maybe")


def test_mimic_studies_without_labels_are_counted(mimic):
    table = mimic / "mimic-cxr-2.0.0-chexpert.csv.gz"
    study = pd.read_csv(table, dtype=str)["study_id"][0]
    before = MimicCxrJpg(mimic, None)
    lost = sum(film.meta["study"] == study for film in before)
    _edit(table, lambda frame: frame.iloc[1:])
    after = MimicCxrJpg(mimic, None)
    assert len(after) == len(before) - lost
    assert len(after.skipped) == lost
    assert after.skipped[0]["reason"] == f"study {study} has no row in {table.name}"
    assert after.skipped[0].keys() == {"id", "path", "reason"}


def test_mimic_films_have_sex_and_age_where_mimic_iv_knows_the_subject(mimic):
    table = mimic / "mimic-cxr-2.0.0-metadata.csv.gz"
    metadata = pd.read_csv(table, dtype=str).set_index("dicom_id")
    subjects = sorted(set(metadata["subject_id"]))
    people = mimic / "patients.csv"
    rows = [f"{subject},{'FM'[i % 2]},{40 + i},2178,2014 - 2016," for i, subject in enumerate(subjects[1:])]
    people.write_text("\n".join(["subject_id,gender,anchor_age,anchor_year,anchor_year_group,dod", *rows]) + "\n")
    films = MimicCxrJpg(mimic, None, patients=people)
    assert films.files[-1] == people
    seen = set()
    for film in films:
        if film.patient == subjects[0]:
            assert not {"sex", "age"} & set(film.meta)
            continue
        i = subjects.index(film.patient) - 1
        year = int(metadata.loc[film.id, "StudyDate"][:4])
        assert (film.meta["sex"], film.meta["age"]) == ("FM"[i % 2], str(40 + i + year - 2178))
        seen.add(film.patient)
    assert len(seen) > 5
    assert not {"sex", "age"} & set(MimicCxrJpg(mimic, None).columns)
    _edit(table, lambda frame: frame.assign(StudyDate="soon"))
    with pytest.raises(ValueError, match=r"a date such as 21800506 in .*metadata.*, row \d+, found .* and 'soon'"):
        MimicCxrJpg(mimic, None, patients=people)


def test_mimic_bad_tables_are_named(mimic):
    labels = mimic / "mimic-cxr-2.0.0-chexpert.csv.gz"
    whole = labels.read_bytes()
    for change, message in [
        (
            lambda f: f.rename(columns={"Edema": "Oedema"}),
            r"chexpert\.csv\.gz: missing column 'Edema'.*Oedema.*unexpected",
        ),
        (lambda f: f.drop(columns="Fracture"), "missing column 'Fracture'"),
        (lambda f: f.assign(Covid="1.0"), "unexpected column 'Covid'"),
        (
            lambda f: f.assign(Edema=["2.0", *f["Edema"][1:]]),
            r"row 2, column 'Edema': found '2\.0', expected 1, 0, -1",
        ),
        (lambda f: pd.concat([f, f.iloc[:1]]), "is repeated"),
    ]:
        labels.write_bytes(whole)
        _edit(labels, change)
        with pytest.raises(ValueError, match=message):
            MimicCxrJpg(mimic)
    labels.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cannot read table .*chexpert\.csv\.gz"):
        MimicCxrJpg(mimic)
    labels.write_bytes(whole)

    splits = mimic / "mimic-cxr-2.0.0-split.csv.gz"
    whole = splits.read_bytes()
    _edit(splits, lambda f: f.assign(split=["valid", *f["split"][1:]]))
    with pytest.raises(
        ValueError, match=r"row 2, column 'split': found 'valid', expected one of train, validate, test"
    ):
        MimicCxrJpg(mimic)
    splits.write_bytes(whole)
    _edit(splits, lambda f: f.iloc[:5])
    with pytest.raises(ValueError, match=r"no row for \d+ films"):
        MimicCxrJpg(mimic)
    splits.unlink()
    with pytest.raises(FileNotFoundError, match="split"):
        MimicCxrJpg(mimic)


def test_mimic_missing_files_raise_or_are_listed(mimic):
    films = MimicCxrJpg(mimic)
    gone = films[3]
    gone.image.unlink()
    assert MimicCxrJpg(mimic)[2] == films[2]
    with pytest.raises(FileNotFoundError, match=rf"row \d+ \(film {gone.id}\): no file .*{gone.id}\.jpg.*on_bad"):
        MimicCxrJpg(mimic)[3]
    skipping = MimicCxrJpg(mimic, on_bad="skip")
    assert len(skipping) == len(films) - 1
    assert [row["id"] for row in skipping.skipped] == [gone.id]
    assert gone.id not in skipping.ids()
    assert skipping.label_matrix().shape[0] == len(skipping)
    with pytest.raises(ValueError, match="on_bad"):
        MimicCxrJpg(mimic, on_bad="ignore")


def test_mimic_paths_that_leave_the_root_are_refused(mimic):
    films = MimicCxrJpg(mimic)
    link = films[0].image
    outside = mimic.parent / f"{mimic.name}-outside.jpg"
    link.rename(outside)
    link.symlink_to(outside)
    with pytest.raises(ValueError, match=r"row \d+ .*leads by a link to"):
        MimicCxrJpg(mimic)[0]
    assert "leads by a link" in MimicCxrJpg(mimic, on_bad="skip").skipped[0]["reason"]

    escape = "../../../../../outside"
    for table in ("metadata", "split"):
        _edit(
            mimic / f"mimic-cxr-2.0.0-{table}.csv.gz",
            lambda f: f.replace({"dicom_id": {films.ids()[0]: escape}}),
        )
    with pytest.raises(ValueError, match=r"row \d+ .*leaves the data root"):
        MimicCxrJpg(mimic)
    assert "leaves the data root" in MimicCxrJpg(mimic, on_bad="skip").skipped[0]["reason"]


# ---- CheXpert ---------------------------------------------------------------------------------------------------


def test_chexpert_views_are_chosen(chexpert):
    frame = pd.read_csv(next(chexpert.rglob("train.csv")), dtype=str, keep_default_na=False)
    assert {"AP", "PA"} <= set(frame["AP/PA"])
    assert len(CheXpert(chexpert, views=["AP"])) == (frame["AP/PA"] == "AP").sum()
    assert {film.meta["view"] for film in CheXpert(chexpert, views=["AP"])} == {"AP"}
    with pytest.raises(ValueError, match=r"views LL \(the table has "):
        CheXpert(chexpert, views=["LL"])
    with pytest.raises(ValueError, match="no column 'AP/PA'"):
        CheXpert(chexpert, "test", views=["AP"])


def test_chexpert_files_have_the_released_form(chexpert):
    assert {path.name for path in chexpert.iterdir()} == {
        "train", "valid", "test", "train.csv", "valid.csv", "groundtruth.csv", "truth.jsonl",
    }  # fmt: skip
    for split in ("train", "valid"):
        assert _header(chexpert / f"{split}.csv") == "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(CHEXPERT.labels)
        frame = pd.read_csv(chexpert / f"{split}.csv", dtype=str, keep_default_na=False)
        assert (
            frame["Path"]
            .str.fullmatch(rf"CheXpert-v1\.0-small/{split}/patient\d{{5}}/study\d/view\d_(frontal|lateral)\.jpg")
            .all()
        )
        assert (frame["AP/PA"] == "").equals(frame["Frontal/Lateral"] == "Lateral")
    assert _header(chexpert / "groundtruth.csv") == "Study," + ",".join(CHEXPERT.labels)
    studies = pd.read_csv(chexpert / "groundtruth.csv", dtype=str)
    assert studies["Study"].str.fullmatch(r"CheXpert-v1\.0/test/patient\d{5}/study\d").all()
    assert set(studies.iloc[:, 1:].to_numpy().ravel()) == {"0", "1"}
    assert [len(CheXpert(chexpert, split)) for split in ("train", "valid", "test")] == [20, 5, 8]


def test_chexpert_laterals_parents_and_mirrors(chexpert):
    train = pd.read_csv(chexpert / "train.csv")
    assert len(CheXpert(chexpert, frontal_only=False)) == len(train) > 20
    films = CheXpert(chexpert)
    held = chexpert / "held"
    held.mkdir()
    (held / "CheXpert-v1.0-small").symlink_to(chexpert)
    above = CheXpert(held)
    assert [film.id for film in above] == [film.id for film in films]
    _edit(chexpert / "train.csv", lambda f: f.rename(columns=lambda name: name.replace(" ", "_")))
    _edit(chexpert / "train.csv", lambda f: f.replace({"Path": {"-small": ""}}, regex=True))
    assert list(CheXpert(chexpert)) == list(films)
    shuffled = [*train.columns[:5], *sorted(CHEXPERT.labels)]
    train[shuffled].to_csv(chexpert / "train.csv", index=False)
    assert (CheXpert(chexpert).label_matrix() == films.label_matrix()).all()


def test_chexpert_hierarchy_is_in_the_written_labels(chexpert):
    for film in CheXpert(chexpert):
        labels = set(film.labels)
        if labels & {"Edema", "Consolidation", "Pneumonia", "Atelectasis", "Lung Lesion"}:
            assert "Lung Opacity" in labels
        assert "Cardiomegaly" not in labels or "Enlarged Cardiomediastinum" in labels
        assert "No Finding" not in labels or labels == {"No Finding"}


def test_chexpert_test_studies_without_films(chexpert):
    films = CheXpert(chexpert, "test")
    study = films[0].image.parent
    lost = list(study.glob("view*_frontal.jpg"))
    for path in lost:
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"groundtruth\.csv, row 2: no view\*_frontal\.jpg"):
        CheXpert(chexpert, "test")
    skipping = CheXpert(chexpert, "test", on_bad="skip")
    assert len(skipping) == 8 - len(lost)
    assert len(skipping.skipped) == 1
    with pytest.raises(ValueError, match="split must be"):
        CheXpert(chexpert, "validate")


def test_chexpert_bad_tables_and_paths_are_named(chexpert):
    table = chexpert / "train.csv"
    whole = table.read_text()

    def with_path(text):
        return lambda frame: frame.assign(Path=[frame["Path"][0], text, *frame["Path"][2:]])

    for change, message in [
        (with_path("../../etc/passwd"), r"row 3, column 'Path': found '\.\./\.\./etc/passwd'"),
        (with_path("train/patient00001/study1/.."), r"row 3 .*leaves the data root"),
        (with_path("/abs/train/patient00001/study1/view1_frontal.jpg"), "row 3, column 'Path'"),
        (lambda f: f.drop(columns="Path"), r"train\.csv: missing column 'Path'"),
        (
            lambda f: f.rename(columns={"Pleural Effusion": "Pleural Efusion"}),
            "nearest found: Pleural Efusion",
        ),
        (lambda f: f.assign(Fracture="yes"), "row 2, column 'Fracture': found 'yes'"),
        (
            lambda f: f.assign(**{"Frontal/Lateral": "Oblique"}),
            "found 'Oblique', expected Frontal or Lateral",
        ),
        (lambda f: pd.concat([f, f.iloc[:1]]), "the id is repeated, first found in row 2"),
    ]:
        table.write_text(whole)
        _edit(table, change)
        with pytest.raises(ValueError, match=message):
            CheXpert(chexpert)
    with pytest.raises(FileNotFoundError, match=r"train\.csv"):
        CheXpert(chexpert / "valid")


# ---- NIH --------------------------------------------------------------------------------------------------------


def test_nih_files_have_the_released_form(nih):
    assert _header(nih / "Data_Entry_2017_v2020.csv") == (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    )
    rows = list(csv.reader((nih / "Data_Entry_2017_v2020.csv").open()))
    assert {len(row) for row in rows} == {11}
    files = {path.name for path in (nih / "images_001" / "images").iterdir()}
    assert files == {row[0] for row in rows[1:]}
    assert all(row[0] == f"{int(row[3]):08d}_{int(row[2]):03d}.png" for row in rows[1:])
    listed = [(nih / name).read_text().split() for name in ("train_val_list.txt", "test_list.txt")]
    assert [len(names) for names in listed] == [20, 6]
    assert set(listed[0]) | set(listed[1]) == files
    assert Image.open(nih / "images_001" / "images" / rows[1][0]).mode == "L"


def test_nih_splits_views_flat_and_spread_folders(nih):
    assert [len(Nih14(nih, split)) for split in ("train_val", "test", None)] == [20, 6, 26]
    films = Nih14(nih)
    pa = Nih14(nih, views=("PA",))
    assert {film.meta["view"] for film in pa} == {"PA"}
    assert 0 < len(pa) < 26
    (nih / "images_012" / "images").mkdir(parents=True)
    moved = films[4].image
    moved.rename(nih / "images_012" / "images" / moved.name)
    assert Nih14(nih)[4].image.parent.parent.name == "images_012"
    (nih / "images_012" / "images" / moved.name).rename(moved)
    (nih / "images_001" / "images").rename(nih / "images")
    assert (Nih14(nih).label_matrix() == films.label_matrix()).all()
    assert Nih14(nih)[4].image == nih / "images" / moved.name
    plain = nih / "Data_Entry_2017_v2020.csv"
    (nih / "Data_Entry_2017_v2020.csv.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    assert len(Nih14(nih)) == 26


def test_nih_missing_films_raise_or_are_listed(nih):
    gone = Nih14(nih)[2]
    gone.image.unlink()
    with pytest.raises(FileNotFoundError, match=rf"row 4: {gone.id} is in no image folder .*1 missing"):
        Nih14(nih)
    skipping = Nih14(nih, on_bad="skip")
    assert len(skipping) == 25
    assert [row["id"] for row in skipping.skipped] == [gone.id]


def test_nih_bad_rows_are_named(nih):
    films = Nih14(nih)
    table = nih / "Data_Entry_2017_v2020.csv"
    whole = table.read_text()
    table.write_text(whole.replace(films.ids()[3], "../../secret.png"))
    with pytest.raises(ValueError, match=r"row 5 .*leaves the data root"):
        Nih14(nih)
    assert [row["id"] for row in Nih14(nih, on_bad="skip").skipped] == ["../../secret.png"]
    table.write_text(whole.replace("No Finding", "No_Finding", 1))
    with pytest.raises(ValueError, match=r"unknown label 'No_Finding' in .*row \d+.*nearest known: No Finding"):
        read_nih_table(table)
    table.write_text(whole.replace("Finding Labels", "Findings", 1))
    with pytest.raises(ValueError, match="missing column 'Finding Labels'"):
        read_nih_table(table)
    table.write_text(whole)
    (nih / "test_list.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test_list\.txt; open with split=None"):
        Nih14(nih, "test")


def test_nih_table_needs_no_images(nih):
    for path in (nih / "images_001" / "images").iterdir():
        path.unlink()
    (nih / "images_001" / "images").rmdir()
    table = read_nih_table(nih / "Data_Entry_2017_v2020.csv")
    assert table.labels.shape == (len(table), 15) == (26, 15)
    assert table.labels.any(axis=1).all()
    with pytest.raises(FileNotFoundError, match="read_nih_table"):
        Nih14(nih)


def test_nih_split_lists_as_people_save_them(nih):
    whole = (nih / "test_list.txt").read_text()
    names = whole.split()
    (nih / "test_list.txt").write_text("\ufeff" + whole.replace("\n", "\r\n"))
    assert list(Nih14(nih, "test").ids()) == names
    for text in (whole.replace(names[2], f"images_001/images/{names[2]}"), whole.replace(".png", ".jpg")):
        (nih / "test_list.txt").write_text(text)
        with pytest.raises(
            ValueError, match=rf"of its 6 names are not in .*, the first '.*; .* such as '{names[0][:8]}|0000"
        ):
            Nih14(nih, "test")
    (nih / "test_list.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"Data_Entry.*: no film is left of split 'test'$"):
        Nih14(nih, "test")
    (nih / "Data_Entry_2017_v2020.csv").rename(nih / "Data_Entry_2017.csv")  # as the first release called it
    assert len(Nih14(nih)) == 26


@pytest.mark.parametrize("kind", ["mimic-cxr-jpg", "nih-cxr14", "nih-extract"])
def test_views_that_no_film_has_are_named(tmp_path, kind):
    WRITERS[kind](tmp_path, films=12, seed=0, size=16)
    with pytest.raises(ValueError, match=r"no film is left of .*views ap, pa \(the table has (AP|PA)"):
        _opened(kind, tmp_path, views=["ap", "pa"])


def test_a_table_with_a_header_only(nih, chexpert):
    for path, use in ((nih / "Data_Entry_2017_v2020.csv", Nih14), (chexpert / "train.csv", CheXpert)):
        path.write_text(path.read_text().splitlines()[0] + "\n")
        with pytest.raises(ValueError, match=rf"{path.name}: no film is left"):
            use(path.parent)


def test_an_extract_needs_four_columns(tmp_path):
    WRITERS["nih-extract"](tmp_path, films=6, seed=2, size=16)
    _edit(tmp_path / "labels.csv", lambda frame: frame.drop(columns=["age", "gender", "view"]))
    assert NihExtract(tmp_path)[0].meta == {}
    with pytest.raises(ValueError, match="missing column 'view'"):
        NihExtract(tmp_path, views=["AP"])
    _edit(tmp_path / "labels.csv", lambda frame: frame.drop(columns=["path"]))
    with pytest.raises(ValueError, match=r"missing column 'path' \(found: image_index, finding_labels, patient_id\)"):
        NihExtract(tmp_path)


def test_extract_paths_stay_inside(tmp_path):
    WRITERS["nih-extract"](tmp_path, films=6, seed=2, size=16)
    whole = (tmp_path / "labels.csv").read_text()
    id = NihExtract(tmp_path)[1].id
    for path in (f"../films/{id}", f"/films/{id}", f"..\\films\\{id}"):
        (tmp_path / "labels.csv").write_text(whole.replace(f"films/{id}", path))
        with pytest.raises(ValueError, match=r"labels\.csv, row 3 .*leaves the data root"):
            NihExtract(tmp_path)
        assert [row["id"] for row in NihExtract(tmp_path, on_bad="skip").skipped] == [id]


# ---- tables and paths -------------------------------------------------------------------------------------------


def test_inside_follows_links(tmp_path):
    root = tmp_path / "root"
    (root / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("")
    (root / "good").symlink_to(root / "deep")
    (root / "bad").symlink_to(tmp_path)
    assert inside(root, "deep/film.png") == root / "deep" / "film.png"
    assert inside(root, "good/film.png") == root / "deep" / "film.png"
    assert inside(root, "a..b.png") == root / "a..b.png"
    for path in ("../secret", "deep/../../secret", "/etc/passwd", "bad/secret", "deep\\..\\..\\secret"):
        with pytest.raises(ValueError, match="root"):
            inside(root, path)
    os.symlink(root, tmp_path / "alias")
    assert inside(tmp_path / "alias", "deep/film.png") == root / "deep" / "film.png"


def test_tables_are_read_by_name(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("\ufeffLung_Lesion,extra,id\n1,x,007\n,y,8\n-1.0,z,9\n")
    frame = read_table(path, ("id", "Lung Lesion"))
    assert list(frame["id"]) == ["007", "8", "9"]
    assert np.array_equal(label_values(frame, path, ["Lung Lesion"]), [[1], [np.nan], [-1]], equal_nan=True)
    with pytest.raises(ValueError, match="unexpected column 'extra'"):
        read_table(path, ("id", "Lung Lesion"), closed=True)
    path.write_text("id,id\n1,2\n")
    with pytest.raises(ValueError, match="repeated column 'id'"):
        read_table(path, ("id",))
    path.write_text("")
    with pytest.raises(ValueError, match="missing column 'id'"):
        read_table(path, ("id",))
    for text, message in [
        ("id,n\n1,2,3\n", "row 2: found 3 fields, expected 2"),
        ("id,n\n1,2\n3,4\n5", "row 4: found 1 fields, expected 2"),
        ("id,n\n\n1,2\n", "row 2: found 0 fields, expected 2"),
        ('id,n\n1,"2\n', "cannot read table"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_table(path, ("id",))
    path.write_text("id,n\n1,2\n\n\n")
    assert len(read_table(path, ("id",))) == 1
    path.write_bytes(b"id\n\xff\xfe\n")
    with pytest.raises(ValueError, match=r"cannot read table .*t\.csv"):
        read_table(path, ("id",))
    with pytest.raises(FileNotFoundError, match="no table"):
        read_table(tmp_path / "absent.csv", ("id",))


# ---- real files -------------------------------------------------------------------------------------------------

NIH_POSITIVES = {
    "No Finding": 60_361, "Infiltration": 19_894, "Effusion": 13_317, "Atelectasis": 11_559, "Nodule": 6_331,
    "Mass": 5_782, "Pneumothorax": 5_302, "Consolidation": 4_667, "Pleural_Thickening": 3_385, "Cardiomegaly": 2_776,
    "Emphysema": 2_516, "Edema": 2_303, "Fibrosis": 1_686, "Pneumonia": 1_431, "Hernia": 227,
}  # fmt: skip


def test_real_nih_table():
    table = read_nih_table(_real("nih_cxr14", "Data_Entry_2017_v2020.csv.gz"))
    assert len(table) == 112_120
    assert len(set(table.patients)) == 30_805
    assert dict(zip(NIH14.labels, table.labels.sum(axis=0), strict=True)) == NIH_POSITIVES
    assert table.frame["Finding Labels"].nunique() == 836
    assert not (table.labels[:, -1] & table.labels[:, :-1].any(axis=1)).any()


@pytest.mark.parametrize(("folder", "films", "size"), [("nih_images_tiny64", 1000, 64), ("nih_images", 300, 512)])
def test_real_nih_extracts(folder, films, size):
    extract = _opened("nih-extract", _real(folder), on_bad="skip")
    assert len(extract) == films
    assert extract.skipped == []
    frame = pd.read_csv(extract.table)
    for i, label in enumerate(NIH14.labels[:-1]):
        assert (extract.label_matrix()[:, i] == frame[label].to_numpy(bool)).all()
    assert load_image(extract[0].image).shape == (size, size, 3)
    assert load_image(extract[0].image, 64).shape == (64, 64, 3)


def test_real_full_size_film():
    pixels = load_image(_real("nih_images", "fullsize_1024", "00009285_000.png"))
    assert pixels.shape == (1024, 1024, 3)
    assert pixels.std() > 20


def test_real_chexpert_study_table():
    table = read_study_table(_real("chexpert_test_labels", "groundtruth.csv"))
    assert len(table) == 500
    assert table["path"][0] == "test/patient64741/study1"
    assert (table["Lung Opacity"] == "1").sum() == 264
    assert (table["Lung Lesion"] == "1").sum() == 8
