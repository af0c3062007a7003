"""Probes in a study: a model that does not look at films is found, and measurements are artefacts like all others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from test_chain import rows

from vlmalign.config import ConfigError
from vlmalign.config_yaml import write_yaml
from vlmalign.data.sources.nih_boxes import read_boxes
from vlmalign.evaluation.f1 import label_matrix
from vlmalign.models.model import Model
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.graph import Edge, build_graph
from vlmalign.studies.engine.run import Asked, run
from vlmalign.studies.engine.status import status
from vlmalign.weights.checkpoint import load_config, load_params, save_params

BOXES = "{run}/sources/nih/BBox_List_2017.csv"
ALTERED = ("blank", "shuffled", "border")
#: what the toy base calls findings, with the places that it names
WORDS = {
    "No Finding": ["clear"], "Cardiomegaly": ["heart"], "Lung Opacity": ["opacity"], "Lung Lesion": ["lesion", "mass"],
    "Edema": ["edema"], "Consolidation": ["consolidation"], "Pneumonia": ["pneumonia"], "Atelectasis": ["atelectasis"],
    "Pneumothorax": ["pneumothorax"], "Pleural Effusion": ["effusion"], "Pleural Other": ["rind"],
    "Fracture": ["fracture"], "Support Devices": ["line", "tube", "pacemaker"],
}  # fmt: skip
PLACES = [
    "",
    " both",
    *(f" {side}{zone}" for side in ("left", "right") for zone in ("", " upper", " middle", " lower")),
]
SYNONYMS = {
    label: [word + place for word in words for place in PLACES if word + place != label.lower()]
    for label, words in WORDS.items()
}


def study_of(folder: Path) -> dict:
    """Two invented archives of 64 px, and the toy base beside itself blinded."""
    films = {"size": 64}
    states = {"stages": ["seeing", "blind"], "draws": 20}
    return {
        "run": str(folder / "run"),
        "sources": {
            "mimic": {"kind": "mimic-cxr-jpg", "root": "{run}/sources/mimic", "split": "train",
                      "phantom": {**films, "films": {"train": 60, "validate": 1, "test": 1}, "seed": 1}},
            "nih": {"kind": "nih-cxr14", "root": "{run}/sources/nih", "split": "test", "label_map": "nih14-to-chexpert9",
                    "phantom": {**films, "films": {"train_val": 1, "test": 24}, "seed": 3}},
        },
        "sets": {"near": {"from": "mimic", "draw": "patients", "size": 24, "role": "test"},
                 "train": {"from": "mimic", "apart": ["near"]}, "far": {"from": "nih", "role": "test"}},
        "tasks": {"findings": {"kind": "labels", "labels": "chexpert", "form": "plain", "prompt": "List the findings.",
                               "synonyms": SYNONYMS, "state_separator": False}},
        "stages": {"seeing": {"kind": "model", "path": "configs/models/tiny-medgemma"},
                   "blind": {"kind": "model", "path": str(folder / "blind")}},
        "answers": {"test": {"stages": ["seeing", "blind"], "sets": ["near"], "completion": 64, "rows": 24,
                             "prompt_multiple": 64, "draws": 20}},
        "probes": {
            "looks": {"kind": "altered", "answers": "test", "draws": 20},
            "pairs": {"kind": "pairs", "answers": "test", "training": "train", "draws": 20},
            "place": {"kind": "institution", "sets": ["near", "far"], "folds": 3, **states},
            "finding": {"kind": "occlusion", "sets": ["far"], "boxes": BOXES, "cells": 4, "patch": 2, **states},
        },
    }  # fmt: skip


@pytest.fixture
def written(tmp_path) -> Path:
    (tmp_path / "study.yaml").write_text(write_yaml(study_of(tmp_path)))
    return tmp_path / "study.yaml"


def test_what_probes_are_made_from(written):
    nodes = build_graph(load_study(written))
    names = list(nodes)
    for node in nodes.values():
        assert all(names.index(edge.node) < names.index(node.name) for edge in node.parents.values())
    assert nodes["measured/looks/blind/near@blank"].parents == {"stage": Edge("stages/blind"), "set": Edge("sets/near")}
    assert {edge.node for edge in nodes["probes/looks"].parents.values()} == {
        f"{room}/{stage}/near{films}"
        for stage in ("seeing", "blind")
        for room, films in [("answers/test", ""), *(("measured/looks", f"@{films}") for films in ALTERED)]
    }
    assert nodes["probes/pairs"].parents["training"] == Edge("sets/train")
    assert {edge.node for edge in nodes["probes/place"].parents.values()} == {
        f"measured/place/{stage}/{each}" for stage in ("seeing", "blind") for each in ("near", "far")
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("probes.looks.answers=tset", r"probes.looks.answers: no answers entry is called 'tset'; the nearest is 'test'"),
        ("probes.looks.films=[grey]", r"probes.looks.films.*found 'grey'"),
        ("probes.looks.border=0.5", r"probes.looks.border: expected less than 0.5"),
        ("probes.place.sets=[near]", r"probes.place.sets"),
        ("probes.place.stages=[seing]", r"probes.place.stages: no stage is called 'seing'; the nearest is 'seeing'"),
        ("probes.pairs.training=trian", r"probes.pairs.training: no set is called 'trian'; the nearest is 'train'"),
        ("probes.finding.patch=4", r"patch must be smaller than cells \(4\)"),
        ("tasks.findings={kind: free}", r"probes.looks: probes are of label lists.*found findings, which is free"),
    ],
)  # fmt: skip
def test_bad_probes(written, override, expected):
    with pytest.raises(ConfigError, match=expected):
        load_study(written, [override])


@pytest.fixture(scope="module")
def study(tmp_path_factory, repository) -> Path:
    """The study, with the blind model in its place: its projector gives zeros for every film."""
    folder = tmp_path_factory.mktemp("probes")
    base = repository / "configs" / "models" / "tiny-medgemma"
    shutil.copytree(base, folder / "blind")
    model = Model(load_config(base))
    params = load_params(base, model)
    projector = {name: jnp.zeros_like(value) for name, value in params.items() if "projector" in name}
    assert projector
    save_params(folder / "blind", {**params, **projector}, model, json.loads((base / "config.json").read_text()))
    data = study_of(folder)
    data["stages"]["seeing"]["path"] = str(base)
    (folder / "study.yaml").write_text(write_yaml(data))
    return folder / "study.yaml"


def start(study: Path, *overrides: str, asked: Asked = Asked()) -> Path:
    return run(load_study(study, overrides), study, asked)


@pytest.fixture(scope="module")
def finished(study) -> Path:
    return start(study)


def results(finished: Path, probe: str) -> list[dict]:
    return json.loads((finished / "probes" / probe / "results.json").read_text())["rows"]


@pytest.mark.full
def test_a_model_that_does_not_look_is_found(finished):
    found = results(finished, "looks")
    assert [(row["stage"], row["films"]) for row in found] == [
        (stage, films) for stage in ("seeing", "blind") for films in ("whole", *ALTERED)
    ]
    altered = [row for row in found if row["films"] != "whole"]
    for row in altered:
        if row["stage"] == "blind":
            assert row["same"]["value"] == row["same"]["low"] == 1.0
            (block,) = row["differences"]
            gaps = [block["macro"], block["micro"], *(label["f1"] for label in block["labels"])]
            assert {gap["value"] for gap in gaps} <= {0.0, None}
            assert {gap[side] for gap in gaps for side in ("low", "high")} <= {0.0, None}
        else:
            assert row["same"]["value"] < 1.0


@pytest.mark.full
def test_answers_to_altered_films_say_what_was_shown(finished):
    whole = rows(finished / "answers" / "test" / "seeing" / "near" / "predictions.jsonl")
    patient = {row["id"]: row["patient"] for row in whole}
    image = {row["id"]: row["image"] for row in whole}
    for films in ALTERED:
        found = rows(finished / "measured" / "looks" / "seeing" / f"near@{films}" / "rows.jsonl")
        assert {row["films"] for row in found} == {films}
        assert [row["id"] for row in found] == list(patient)
        assert [row["truth"] for row in found] == [row["truth"] for row in whole]
        assert any(a["completion"] != b["completion"] for a, b in zip(whole, found, strict=True))
        if films == "shuffled":
            assert all(patient[row["id"]] != patient[row["shown"]] for row in found)
            assert all(row["image"] == image[row["shown"]] for row in found)


@pytest.mark.full
def test_pairs_are_those_of_the_answers_and_the_tables(finished):
    (found, _) = results(finished, "pairs")
    assert len(found["pairs"]) == 14 * 13 // 2
    pair = next(each for each in found["pairs"] if each["labels"] == ["No Finding", "Support Devices"])
    answers = rows(finished / "answers" / "test" / "seeing" / "near" / "predictions.jsonl")
    taught = rows(finished / "sets" / "train" / "cases.jsonl")
    for name, lists in (
        ("answers", [row["predicted"] for row in answers]),
        ("truth", [row["truth"] for row in answers]),
        ("training", [row["labels"] for row in taught]),
    ):
        films = label_matrix([[each for each in row if each in pair["labels"]] for row in lists], tuple(pair["labels"]))
        a, b, c, d = ((films == cell).all(axis=1).sum() + 0.5 for cell in ([1, 1], [1, 0], [0, 1], [0, 0]))
        assert pair[name]["value"] == pytest.approx(np.log(a * d / (b * c)))


@pytest.mark.full
def test_the_origin_of_films_is_told_from_a_tower_that_sees_them(finished):
    found = {(row["features"], row["stage"], row["control"]): row for row in results(finished, "place")}
    assert set(found) == {("labels", None, "labels")} | {
        (features, stage, control)
        for features in ("tower", "prompt")
        for stage in ("seeing", "blind")
        for control in (None, "shuffled")
    }
    assert found["tower", "seeing", None]["auroc"]["low"] > 0.8
    assert found["prompt", "seeing", None]["accuracy"]["value"] > found["prompt", "seeing", None]["majority"]
    for features in ("tower", "prompt"):  # zeros for every film, and the same prompt
        assert found[features, "blind", None]["auroc"]["value"] < 0.6
    (first, *_) = rows(finished / "measured" / "place" / "blind" / "far" / "rows.jsonl")
    assert set(first["tower"]) == {0.0}


@pytest.mark.full
def test_occlusion_of_a_model_that_does_not_look_is_the_random_control(finished):
    boxed = {(box.id, box.label) for box in read_boxes(finished / "sources" / "nih" / "BBox_List_2017.csv")}
    measured = rows(finished / "measured" / "finding" / "seeing" / "far" / "rows.jsonl")
    assert {row["id"] for row in measured} <= {id for id, _ in boxed}
    assert {row["label"] for row in measured} <= {"Atelectasis", "Lung Lesion", "Pneumonia", "Pneumothorax"}
    assert any(np.abs(row["map"]).max() > 0.01 for row in measured)
    found = {(row["system"], row["label"]): row for row in results(finished, "finding")}
    assert {system for system, _ in found} == {"seeing", "blind", "centre", "random"}
    assert sum(
        row["hit"]["n"] for (system, label), row in found.items() if system == "seeing" and label != "all"
    ) == len(measured)
    for row in rows(finished / "measured" / "finding" / "blind" / "far" / "rows.jsonl"):
        assert set(np.ravel(row["map"])) == {0.0}
    for (system, label), row in found.items():
        if system == "blind":
            assert row["hit"] == found["random", label]["hit"]
            assert row["iou"] == found["random", label]["iou"]


@pytest.mark.full
def test_the_report_has_a_table_of_each_probe(finished):
    page = (finished / "report.html").read_text()
    assert 'id="probes"' in page
    for title in (
        "looks: altered films", "pairs: labels named together", "place: which data set a film comes from", "finding: occlusion",
    ):  # fmt: skip
        assert title in page


@pytest.mark.full
def test_measurements_are_artefacts(study, finished):
    assert {line.state for line in status(finished)} == {"given", "done"}
    before = {path: path.read_bytes() for path in finished.rglob("made.json") if "probes" not in path.parts[-3:]}
    start(study, "probes.looks.draws=30", "probes.finding.top=0.2")  # results follow at once
    assert {path: path.read_bytes() for path in before} == before
    with pytest.raises(
        ValueError, match=r"measured/looks/\w+/near@border was made from something else: border"
    ) as error:
        start(study, "probes.looks.border=0.2")
    assert "near@blank" not in str(error.value)
    with pytest.raises(
        ValueError, match=r"measured/finding/\w+/far was made from something else: cells: 4 then, 5 now"
    ):
        start(study, "probes.finding.cells=5")
    with pytest.raises(ValueError, match=r"probes.finding.boxes: no list of boxes"):
        start(study, "probes.finding.boxes=nowhere.csv")
