"""Tables of probes: the numbers of `results.json` with their intervals, and files that are none of a probe."""

import json

import pytest

from vlmalign.reporting.probes import BLANK, Cell, probe_tables


def interval(value: float | None, low: float | None = None, high: float | None = None) -> dict:
    return {"value": value, "low": low, "high": high, "n": 7, "patients": 5}


GAP = interval(-0.25, -0.5, 0.125)


def write(folder, kind: str, rows: list) -> None:
    (folder / "probes" / "mine").mkdir(parents=True)
    text = json.dumps({"kind": kind, "level": 0.95, "draws": 20, "seed": 0, "rows": rows})
    (folder / "probes" / "mine" / "results.json").write_text(text)


def test_altered_films(tmp_path):
    label = {"label": "Edema", "support": 3, "f1": interval(0.5, 0.25, 0.75)}
    block = {name: interval(0.5, 0.25, 0.75) for name in ("micro", "macro", "macro_all")}
    block |= {"labels": ["Edema"], "exact_match": 0.5, "macro_labels": 1, "per_label": [label]}
    own = {"stage": "sft", "dataset": "near", "results": {"n": 7, "patients": 5, "blocks": {"all 1": block}}}
    gaps = {"subset": "all 1", "macro": GAP, "micro": GAP, "labels": [{**label, "f1": GAP}]}
    altered = {**own, "films": "blank", "same": interval(1.0, 1.0, 1.0), "differences": [gaps]}
    write(tmp_path, "altered", [{**own, "films": "whole"}, altered])
    whole, labels = probe_tables(tmp_path)
    assert whole.rows[0][3:] == [Cell("0.500", "0.250 to 0.750", True), BLANK, BLANK, BLANK]
    assert whole.rows[1][2] == Cell("blank")
    assert whole.rows[1][4] == Cell("−0.250", "−0.500 to +0.125", True)
    assert whole.rows[1][6] == Cell("1.000", "1.000 to 1.000", True)
    assert labels.folded
    assert labels.columns == ("Label", "Cases", "sft, blank")
    assert labels.rows == [[Cell("Edema"), Cell("3", number=True), whole.rows[1][4]]]


def test_pairs_are_sorted_by_how_far_they_lie_from_the_truth_and_rare_ones_left_out(tmp_path):
    def pair(name: str, fewest: int, far: float) -> dict:
        odds = {each: interval(0.5, 0.25, 0.75) for each in ("answers", "truth", "training", "from_training")}
        return {"labels": [name, "Edema"], "fewest": fewest, **odds, "from_truth": interval(far, far, far)}

    pairs = [pair("a", 10, 0.5), pair("b", 9, 4.0), pair("c", 30, -1.5)]
    row = {"dataset": "near", "training": "train", "pairs": pairs}
    write(tmp_path, "pairs", [{**row, "stage": "sft"}, {**row, "stage": "grpo", "pairs": pairs[1:2]}])
    (table,) = probe_tables(tmp_path)
    assert [(row[1].text, row[2].text) for row in table.rows] == [
        ("sft", "c, Edema"),
        ("sft", "a, Edema"),
        ("grpo", "none"),
    ]
    assert table.rows[0][0].small == "2 of 3 pairs"
    assert table.rows[0][6] == Cell("−1.500", "−1.500 to −1.500", True)


def test_the_institution_and_occlusion(tmp_path):
    scores = {"accuracy": interval(0.75, 0.5, 0.875), "auroc": interval(0.5, 0.25, 0.75), "majority": 0.5}
    write(tmp_path / "one", "institution", [{"stage": None, "features": "labels", "control": "labels", **scores}])
    (table,) = probe_tables(tmp_path / "one")
    assert [cell.text for cell in table.rows[0]] == ["labels", "", "labels", "7", "0.500", "0.750", "0.500"]

    own = {"dataset": "far", "hit": interval(0.5), "iou": interval(None)}
    stage = {**own, "system": "sft", "control": False, "hit_from_centre": GAP}
    rows = [
        {**stage, "label": "all"},
        {**stage, "label": "Mass"},
        {**own, "system": "centre", "control": True, "label": "all"},
    ]
    write(tmp_path / "two", "occlusion", rows)
    everything, labels = probe_tables(tmp_path / "two")
    assert [row[2].text for row in everything.rows] == ["sft", "control: centre"]
    assert everything.rows[0][4:8] == [Cell("0.500", "no interval", True), Cell("undefined", "", True),
                                       Cell("−0.250", "−0.500 to +0.125", True), BLANK]  # fmt: skip
    assert [row[1].text for row in labels.rows] == ["Mass"]


def test_a_run_without_probes_has_no_tables(tmp_path):
    assert probe_tables(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "rows", "expected"),
    [
        ("films", [], "no probe is of kind 'films'; known: altered, pairs, institution, occlusion"),
        ("pairs", [{"stage": "sft"}], "rows, item 1: expected 'dataset'"),
        ("occlusion", [3], "rows, item 1: expected an object, found a whole number"),
    ],
)
def test_files_that_are_no_results_of_a_probe(tmp_path, kind, rows, expected):
    write(tmp_path, kind, rows)
    with pytest.raises(ValueError, match=rf"probes/mine/results.json.*{expected}"):
        probe_tables(tmp_path)
