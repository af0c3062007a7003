"""Human readers of the CheXpert test labels: read by column name, scored like any model; on the real files where they are."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from vlmalign.data.sources.schema import CHEXPERT
from vlmalign.evaluation.human_readers import BENCHMARK, LABELER, SUBSETS, TRUTH, read_readings, score_readers

#: as the readers' files have them
SWAPPED = [*CHEXPERT.labels[:3], CHEXPERT.labels[4], CHEXPERT.labels[3], *CHEXPERT.labels[5:]]


def write(path: Path, labels, matrix, order) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["Study", *labels])
        for place in order:
            values = dict(zip(CHEXPERT.labels, matrix[place], strict=True))
            study = f"CheXpert-v1.0/test/patient{64000 + place // 2}/study{place % 2 + 1}"
            writer.writerow([study, *(values[label] for label in labels)])


@pytest.fixture
def folder(tmp_path):
    """Twelve studies of six patients; the third reader's table is in another order of rows, all readers' of columns."""
    rng = np.random.default_rng(0)
    truth = (rng.random((12, 14)) < 0.5).astype(int)
    readers = [np.where(rng.random((12, 14)) < 0.8, truth, 1 - truth) for _ in range(3)]
    write(tmp_path / TRUTH, CHEXPERT.labels, truth, range(12))
    for number, matrix in enumerate(readers):
        write(tmp_path / BENCHMARK / f"r{number}.csv", SWAPPED, matrix, range(12)[:: -1 if number == 2 else 1])
    labeler = np.where(truth == 1, "1.0", "").astype(object)
    labeler[0, 0] = "-1.0"  # uncertain: absent
    write(tmp_path / LABELER, CHEXPERT.labels, labeler, range(12))
    return tmp_path, truth.astype(bool), [matrix.astype(bool) for matrix in readers]


def test_each_reader_their_majority_the_labeler_and_all_positive(folder):
    path, truth, readers = folder
    readings = read_readings(path)
    assert list(readings.readers) == [
        "radiologist r0", "radiologist r1", "radiologist r2", "majority of 3 radiologists", "report labeler", "all positive",
    ]  # fmt: skip
    np.testing.assert_array_equal(readings.truth, truth)
    for number, matrix in enumerate(readers):
        np.testing.assert_array_equal(readings.readers[f"radiologist r{number}"], matrix)
    np.testing.assert_array_equal(readings.readers["majority of 3 radiologists"], np.sum(readers, axis=0) >= 2)
    assert not readings.readers["report labeler"][0, 0]
    results = score_readers(readings, draws=20)
    for name, matrix in readings.readers.items():
        block = results[name]["blocks"]["all 14"]
        assert block["micro"]["value"] == pytest.approx(f1_score(truth, matrix, average="micro"))
        assert block["macro_all"]["value"] == pytest.approx(f1_score(truth, matrix, average="macro", zero_division=0))
        assert (results[name]["n"], results[name]["patients"]) == (12, 6)
        assert list(results[name]["blocks"]) == ["all 14", "shared 9"]
        assert len(results[name]["blocks"]["shared 9"]["labels"]) == 9


def test_tables_of_other_studies_are_refused(folder):
    path, truth, _ = folder
    write(path / LABELER, CHEXPERT.labels, truth.astype(int), range(11))
    with pytest.raises(ValueError, match=r"chexpert_labels.csv: expected the 12 studies .* test/patient64005/study2"):
        read_readings(path)
    with pytest.raises(FileNotFoundError, match="no reader's table in"):
        read_readings(path / "labeler")


def test_the_real_readers_agree_with_scikit_learn_and_beat_saying_everything(shared_data):
    real = shared_data / "chexpert_test_labels"
    readings = read_readings(real)
    assert len(readings.studies) == len(set(readings.patients)) == 500
    results = score_readers(readings, draws=100)
    truth = pd.read_csv(real / TRUTH).set_index("Study")[list(CHEXPERT.labels)]
    macro = {}
    for path in sorted((real / BENCHMARK).glob("*.csv")):
        said = pd.read_csv(path).set_index("Study").loc[truth.index, list(CHEXPERT.labels)]
        found = results[f"radiologist {path.stem}"]["blocks"]
        for name, labels in SUBSETS.items():
            theirs = f1_score(truth[list(labels)], said[list(labels)], average="macro", zero_division=0)
            assert found[name]["macro_all"]["value"] == pytest.approx(theirs, rel=1e-12)
        macro[path.stem] = found["all 14"]["macro"]
    worst = min(each["value"] for each in macro.values())
    for name in ("majority of 3 radiologists", "report labeler", "all positive"):
        macro[name] = results[name]["blocks"]["all 14"]["macro"]
        assert macro[name]["low"] <= macro[name]["value"] <= macro[name]["high"]
    assert macro["all positive"]["value"] < worst
    assert macro["majority of 3 radiologists"]["value"] > worst
