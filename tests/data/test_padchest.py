"""PadChest through the table source: invented rows in the form of its released table become films in CheXpert's names."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlmalign.config_yaml import read_yaml
from vlmalign.data.sources.padchest import MAPPING, PADCHEST_TO_CHEXPERT
from vlmalign.data.sources.schema import CHEXPERT, LabelSchema
from vlmalign.data.sources.table import TableFilms

#: columns of the release, in their order; the first has no name
COLUMNS = (
    "", "ImageID", "ImageDir", "StudyDate_DICOM", "StudyID", "PatientID", "PatientBirth", "PatientSex_DICOM",
    "ViewPosition_DICOM", "Projection", "Modality_DICOM", "Report", "MethodLabel", "Labels", "Localizations",
    "LabelsLocalizationsBySentence", "labelCUIS", "LocalizationsCUIS",
)  # fmt: skip

#: (image, folder, study, patient, born, sex, projection, labels), all invented
ROWS = [
    ("1_a.png", "0", "S1", "P1", "1950.0", "F", "PA", "['normal']"),
    ("1_b.png", "0", "S1", "P1", "1950.0", "F", "L", "['normal']"),
    ("2_a.png", "7", "S2", "P2", "1931.0", "M", "AP_horizontal", "['cardiomegaly', ' pleural effusion', 'NSG tube']"),
    ("3_a.png", "7", "S3", "P2", "1931.0", "M", "PA", "['hydropneumothorax', 'scoliosis']"),
    ("4_a.png", "7", "S4", "P3", "1990.0", "M", "PA", "['scoliosis', 'aortic elongation']"),
    ("5_a.png", "7", "S5", "P4", "", "F", "PA", "['unchanged', 'nodule']"),
    ("6_a.png", "7", "S6", "P5", "1970.0", "F", "AP", ""),
    ("7_a.png", "7", "S7", "P6", "1970.0", "F", "PA", "['', 'laminar atelectasis', 'atelectasis', 'a new name']"),
]

#: as docs/evaluation.md shows it
SETTINGS = {
    "kind": "table", "path": "padchest.csv", "images": "images", "image": "ImageID", "subfolder": "ImageDir",
    "patient": "PatientID", "sex": "PatientSex_DICOM", "view": "Projection", "views": ["PA", "AP", "AP_horizontal"],
    "labels": {
        "column": "Labels", "lists": True, "normal": "normal", "blank": "unlabelled",
        "unlabelled": ["exclude", "unchanged", "suboptimal study"],
    },
    "label_map": "padchest-to-chexpert",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    with (tmp_path / "padchest.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="x")
        writer.writeheader()
        for place, (image, where, study, patient, born, sex, projection, labels) in enumerate(ROWS):
            path = tmp_path / "images" / where / image
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
            writer.writerow(
                {
                    "": place, "ImageID": image, "ImageDir": where, "StudyID": study, "PatientID": patient,
                    "PatientBirth": born, "PatientSex_DICOM": sex, "Projection": projection, "Labels": labels,
                    "Report": 'con, comas y "comillas"\ny dos lineas',
                }
            )  # fmt: skip
    return tmp_path


def opened(folder: Path, **changes):
    return TableFilms(**{**SETTINGS, **changes}).open(lambda path: folder / path)


def test_rows_become_films_in_chexpert_names(folder):
    films = opened(folder)
    assert films.schema == CHEXPERT
    assert {example.id: example.labels for example in films} == {
        "0/1_a.png": ("No Finding",),
        "7/2_a.png": ("Cardiomegaly", "Pleural Effusion", "Support Devices"),
        "7/3_a.png": ("Pneumothorax", "Pleural Effusion"),
        "7/4_a.png": (),
        "7/7_a.png": ("Atelectasis",),
    }
    second = films[1]
    assert (second.patient, second.image) == ("P2", folder / "images" / "7" / "2_a.png")
    assert (second.meta["sex"], second.meta["view"], second.meta["PatientBirth"]) == ("M", "AP_horizontal", "1931.0")


def test_the_documentation_shows_these_settings(repository):
    page = (repository / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = [text for text in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "padchest" in text]
    shown = read_yaml(block)["sources"]["padchest"]
    assert shown | {"path": SETTINGS["path"]} == SETTINGS


def test_what_is_not_known_is_left_out_and_listed(folder):
    skipped = {row["id"]: row["reason"] for row in opened(folder).skipped}
    assert skipped == {
        "7/5_a.png": "its label 'unchanged' says that its labels are not known",
        "7/6_a.png": "it has no labels",
    }


def test_labels_without_a_counterpart_are_kept_to_be_stated(folder):
    unmapped = {label: column.tolist() for label, column in opened(folder).unmapped.items()}
    assert unmapped == {
        "a new name": [False, False, False, False, True],
        "aortic elongation": [False, False, False, True, False],
        "scoliosis": [False, False, True, True, False],
    }


def test_the_map_names_each_label_once_except_for_one_that_is_two_findings():
    counts = Counter(len(images) for images in MAPPING.values())
    assert counts == {1: len(MAPPING) - 1, 2: 1}
    assert MAPPING["hydropneumothorax"] == ("Pneumothorax", "Pleural Effusion")
    assert {image for images in MAPPING.values() for image in images} == set(CHEXPERT.labels)
    assert all(name == name.strip() for name in MAPPING)
    parents = {"consolidation", "pneumonia", "pulmonary edema", "atelectasis", "nodule"}
    assert all("Lung Opacity" not in MAPPING[name] for name in parents)


def test_tables_that_are_not_padchest_are_told_so(folder):
    with pytest.raises(
        ValueError, match="label_map 'padchest-to-chexpert' knows none of the labels of t, such as a, b"
    ):
        PADCHEST_TO_CHEXPERT.of(LabelSchema("t", ("a", "b"), None))
    table = folder / "padchest.csv"
    table.write_text(table.read_text().replace("['normal']", "[normal", 1))
    with pytest.raises(
        ValueError, match=r"padchest.csv, row \d+, column 'Labels': expected a list of names .*'\[normal'"
    ):
        opened(folder)
