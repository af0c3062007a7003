"""Human readers as a yardstick: scored from the released labels, kept beside the run, and shown on the set that they read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vlmalign.data.sources.schema import CHEXPERT
from vlmalign.evaluation.human_readers import SUBSETS, Readings, score_readers
from vlmalign.evaluation.results import evaluate_predictions
from vlmalign.reporting.boards import boards
from vlmalign.reporting.html import write_report
from vlmalign.reporting.run_folder import read_run
from vlmalign.studies.engine import readers
from vlmalign.studies.engine.files import Hashes, write_json

STUDY = """
stages: {{base: {{kind: model}}}}
sources: {{test: {{kind: chexpert, split: {split}, root: /x{phantom}}}, other: {{kind: nih-cxr14, root: /y}}}}
sets: {{chexpert: {{from: test, role: test}}, nih: {{from: other, role: test}}}}
answers: {{all: {{}}}}
"""


@pytest.fixture
def readings(monkeypatch) -> Readings:
    rng = np.random.default_rng(0)
    truth = rng.random((20, 14)) < 0.4
    said = {name: truth ^ (rng.random((20, 14)) < share) for name, share in (("radiologist a", 0.1), ("labeler", 0.4))}
    found = Readings(tuple(map(str, range(20))), tuple(str(study // 2) for study in range(20)), truth, said)
    monkeypatch.setattr(readers, "read_readings", lambda folder: found)
    monkeypatch.setattr(readers, "score_readers", lambda readings: score_readers(readings, draws=20))
    return found


def run_of(folder: Path, *, split: str = "test", phantom: str = "") -> Path:
    (folder / "study.yaml").write_text(STUDY.format(split=split, phantom=phantom))
    rows = [
        {"id": str(i), "patient": str(i), "truth": ["Edema"], "predicted": ["Edema"], "valid": True} for i in range(12)
    ]
    scores = evaluate_predictions(rows, CHEXPERT.labels, subsets=SUBSETS, draws=20)
    names = ("chexpert", "nih")
    write_json(
        _made(folder / "scores" / "all") / "results.json",
        {
            "datasets": [{"name": name, "role": "in-schema", "n": 12} for name in names],
            "results": [{"stage": "base", "dataset": name, "results": scores} for name in names],
        },
    )
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_readers_are_scored_once_for_the_same_labels(tmp_path, readings, monkeypatch):
    labels = _made(tmp_path / "labels")
    (labels / "groundtruth.csv").write_text("a")
    readers.write_readers(tmp_path, labels, Hashes(tmp_path / ".hashes.json"))
    path = tmp_path / readers.READERS
    found = json.loads(path.read_text())
    assert found["studies"] == 20
    assert found["readers"] == json.loads(json.dumps(score_readers(readings, draws=20)))
    monkeypatch.setattr(readers, "score_readers", lambda readings: {})
    readers.write_readers(tmp_path, labels, Hashes(tmp_path / ".hashes.json"))
    assert json.loads(path.read_text()) == found
    (labels / "groundtruth.csv").write_text("b")
    readers.write_readers(tmp_path, labels, Hashes(tmp_path / ".hashes.json"))
    assert json.loads(path.read_text())["readers"] == {}
    readers.write_readers(tmp_path, None, Hashes(tmp_path / ".hashes.json"))
    assert not path.exists()


def test_they_stand_beside_the_stages_on_the_set_that_they_read(tmp_path, readings):
    run = run_of(tmp_path)
    readers.write_readers(run, _made(tmp_path / "labels"), Hashes(tmp_path / ".hashes.json"))
    assert {board.dataset: list(board.readers) for board in boards(read_run(run))} == {
        "chexpert": ["radiologist a", "labeler"],
        "nih": [],
    }
    text = write_report(run).read_text()
    for subset in SUBSETS:
        score = json.loads((run / readers.READERS).read_text())["readers"]["labeler"]["blocks"][subset]["macro"]
        assert f"{score['low']:.3f} to {score['high']:.3f}" in text
    assert text.count("Yardstick: 20 studies of the CheXpert test set") == 1
    assert "Readers saw whole studies; a model answers single frontal films" in text


@pytest.mark.parametrize("other", [{"split": "valid"}, {"phantom": ", phantom: {seed: 1}"}])
def test_they_are_no_yardstick_of_other_films(tmp_path, readings, other):
    run = run_of(tmp_path, **other)
    readers.write_readers(run, _made(tmp_path / "labels"), Hashes(tmp_path / ".hashes.json"))
    assert not re.search("Yardstick", write_report(run).read_text())


def test_a_damaged_file_is_named(tmp_path):
    run = run_of(tmp_path)
    write_json(run / readers.READERS, {"studies": 3, "readers": {"a": {}}})
    with pytest.raises(ValueError, match=r"readers\.json, readers, a: expected 'n'"):
        read_run(run)
