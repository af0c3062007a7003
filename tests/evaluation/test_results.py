"""Prediction rows become results ready for JSON, one block per label subset; bad rows and files are named."""

import json

import pytest

from vlmalign.evaluation.results import evaluate_predictions, read_predictions, write_predictions

LABELS = ("a", "b", "c")


def row(id, patient, truth, predicted, valid=True):
    return {"id": id, "patient": patient, "truth": truth, "predicted": predicted, "valid": valid}


ROWS = [
    row("1", "p", ["a"], ["a"]),
    row("2", "p", ["a", "b"], ["a", "c"]),
    row("3", "q", ["b"], [], valid=False),
    row("4", "r", ["c"], ["c"]),
]


def test_results_worked_by_hand():
    results = evaluate_predictions(ROWS, LABELS, draws=50)
    assert (results["n"], results["patients"], results["fail_rate"]) == (4, 3, 0.25)
    assert (results["draws"], results["level"], results["seed"]) == (50, 0.95, 0)
    block = results["blocks"]["all"]
    assert block["labels"] == ["a", "b", "c"]
    assert block["exact_match"] == 0.5
    assert block["micro"]["value"] == 6 / 9  # tp 3, fp 1, fn 2
    assert block["macro"]["value"] == block["macro_all"]["value"] == pytest.approx((1 + 0 + 2 / 3) / 3)
    assert block["macro_labels"] == 3
    a, b, c = block["per_label"]
    assert (a["support"], a["tp"], a["fp"], a["fn"], a["f1"]["value"]) == (2, 2, 0, 0, 1.0)
    assert (b["label"], b["precision"], b["recall"], b["f1"]["value"]) == ("b", None, 0.0, 0.0)
    assert (c["support"], c["tp"], c["fp"], c["fn"], c["precision"]) == (1, 1, 1, 0, 0.5)
    assert set(a["f1"]) == {"value", "low", "high", "n", "patients", "undefined"}
    assert (block["micro"]["n"], block["micro"]["patients"]) == (4, 3)


def test_two_label_subsets_give_two_averages_of_the_same_films():
    results = evaluate_predictions(ROWS, LABELS, subsets={"all 3": LABELS, "shared": ("c", "a")}, draws=50)
    whole, shared = results["blocks"].values()
    assert list(results["blocks"]) == ["all 3", "shared"]
    assert shared["labels"] == ["c", "a"]
    assert shared["macro"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert shared["exact_match"] == 0.5  # film 2 predicts c; film 3 matches on {a, c} but is not valid
    assert [label["f1"] for label in shared["per_label"]] == [
        whole["per_label"][2]["f1"],
        whole["per_label"][0]["f1"],
    ]  # same resamples


def test_results_are_json_and_keep_undefined_as_null():
    rows = [row("1", "p", ["a"], ["a"]), row("2", "q", ["a"], ["a"])]
    results = evaluate_predictions(rows, LABELS, draws=20)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["blocks"]["all"]["per_label"][1]["f1"]["value"] is None
    assert results["blocks"]["all"]["macro_labels"] == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"id": "5", "patient": "p"}, r"row 2 \(id '5'\): expected truth to be a list, found no such field"),
        (row("5", 7, [], []), "expected patient to be a string, found int"),
        (row("5", "p", "a", []), "expected truth to be a list, found str"),
        (row("5", "p", [], [], valid=1), "expected valid to be true or false, found int"),
        (row("1", "p", [], []), r"row 2 \(id '1'\): expected every film once, found it in row 1 too"),
        (row("5", "p", ["flu"], []), r"expected truth among .* found \['flu'\]; map them"),
        (row("5", "p", [], ["flu", "a"]), r"expected predicted among .* found \['flu'\]"),
        (row("5", "p", [], ["a", "a"]), r"each label of predicted once, found \['a', 'a'\]"),
        (row("5", "p", [], ["a"], valid=False), "an invalid completion to predict nothing, found"),
    ],
)
def test_a_bad_row_is_named(bad, message):
    with pytest.raises(ValueError, match=message):
        evaluate_predictions([ROWS[0], bad], LABELS)


@pytest.mark.parametrize("subset", [(), ("a", "flu"), ("a", "a")])
def test_a_bad_subset_is_named(subset):
    with pytest.raises(ValueError, match="expected subset 'mine' to hold labels of"):
        evaluate_predictions(ROWS, LABELS, subsets={"mine": subset})


def test_unknown_names_are_counted_and_are_never_the_empty_set():
    rows = [
        {**row("1", "p", [], []), "unknown": []},
        {**row("2", "q", [], []), "unknown": ["Flu", "flu", "x" * 99]},
        {**row("3", "r", ["a"], ["a"]), "unknown": ["flu"]},
        row("4", "s", ["a"], []),  # rows from before unknown names were counted
    ]
    results = evaluate_predictions(rows, LABELS, draws=20)
    assert results["unknown_rate"] == 0.5
    assert results["unknown_names"] == [{"name": "flu", "count": 2}, {"name": "x" * 60, "count": 1}]
    assert results["blocks"]["all"]["exact_match"] == 0.5  # 1 and 3


def test_a_film_may_have_several_samples():
    rows = [{**ROWS[0], "sample": 0}, {**ROWS[0], "sample": 1, "predicted": []}]
    assert evaluate_predictions(rows, LABELS, draws=20)["n"] == 2
    with pytest.raises(ValueError, match="found it in row 1 too"):
        evaluate_predictions([rows[0], rows[0]], LABELS)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="at least one prediction row, found none"):
        evaluate_predictions([], LABELS)


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "predictions.jsonl"
    rows = [{**ROWS[0], "completion": "line\nbreak \u2028 \r ü \x00"}, ROWS[1]]
    write_predictions(path, iter(rows))
    assert read_predictions(path) == rows
    assert path.read_bytes().count(b"\n") == 2
    write_predictions(path, [])
    assert read_predictions(path) == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_predictions(path, ROWS)
    with pytest.raises(ValueError, match="JSON compliant"):
        write_predictions(path, [ROWS[0], {"score": float("nan")}])
    assert read_predictions(path) == ROWS
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('{"id": "secret", "truth": [', r"not a line of JSON \(Expecting value"),
        ("", r"not a line of JSON \(Expecting value"),
        ('["secret"]', "expected an object, found list"),
        ("null", "expected an object, found NoneType"),
    ],
)
def test_a_malformed_line_is_named_and_not_quoted(tmp_path, line, found):
    path = tmp_path / "predictions.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n")
    with pytest.raises(ValueError, match=f"predictions.jsonl, line 2: {found}") as error:
        read_predictions(path)
    assert "secret" not in str(error.value)
