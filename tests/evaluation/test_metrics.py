"""Results of every kind of task by hand, and its numbers while training agree with them."""

import json

import pytest

from vlmalign.evaluation.bootstrap import bootstrap_ratio
from vlmalign.evaluation.metrics import METRICS, headline, numbers, score
from vlmalign.tasks.choice import ChoiceTask
from vlmalign.tasks.fields import FieldsTask
from vlmalign.tasks.free import FreeTask
from vlmalign.tasks.instructions import InstructionsTask
from vlmalign.tasks.labels import LabelsTask
from vlmalign.tasks.tasks import TASKS


def row(id, patient, truth, predicted, **more):
    known = {"valid": True, "unknown": [], "tokens": 10, "stopped": True}
    return {"id": id, "patient": patient, "truth": truth, "predicted": predicted, **known, **more}


LABELS = LabelsTask(prompt="?", labels=("a", "b", "clear"), normal="clear")
LABEL_ROWS = [
    row("1", "p", ["a"], ["a"]),
    row("2", "p", ["a", "b"], ["a"]),
    row("3", "q", [], [], unknown=["flu"]),
    row("4", "r", ["clear"], ["a", "clear"]),
    row("5", "s", ["b"], [], valid=False),
]
CHOICE_ROWS = [
    row("1", "p", "A", "A"),
    row("2", "p", "B", "A"),
    row("3", "q", "AB", "AB"),
    row("4", "r", "C", None, valid=False),
    row("5", "s", None, "A"),
]
FIELDS = FieldsTask(
    prompt="?",
    fields={
        "s": {"kind": "single", "options": ("x", "y", "z")},
        "o": {"kind": "ordinal", "options": ("low", "mid", "high")},
        "n": {"kind": "number", "tolerance": 1.0},
        "l": {"kind": "list"},
    },
)
FIELD_ROWS = [
    row("1", "p", {"s": "x", "o": "low", "n": 5.0, "l": ["a"]}, {"s": "x", "o": "low", "n": 6.0, "l": ["a"]}),
    row(
        "2", "q", {"s": "y", "o": "low", "n": 5.0, "l": ["a", "b"]}, {"s": "x", "o": "high", "n": 8.0, "l": ["b", "c"]}
    ),
    row("3", "r", {"s": "y", "o": "mid", "n": None, "l": []}, {"s": "y", "o": "high", "n": 1.0, "l": []}),
    row(
        "4", "r", {"s": "x", "o": None, "n": 5.0, "l": ["a"]}, {"s": None, "o": None, "n": None, "l": None}, valid=False
    ),
]
WORDS, BULLETS = {"kind": "words", "high": 3}, {"kind": "bullets"}
INSTRUCTION_ROWS = [
    row("1", "1", [WORDS, BULLETS], [True, True]),
    row("2", "2", [WORDS, BULLETS], [True, False]),
    row("3", "3", [WORDS], [False]),
    row("4", "4", [], []),
]
FREE_ROWS = [row("1", "p", None, "x", tokens=4), row("2", "q", None, "y", tokens=8, stopped=False)]
CASES = {
    "labels": (LABELS, LABEL_ROWS),
    "choice": (ChoiceTask(), CHOICE_ROWS),
    "fields": (FIELDS, FIELD_ROWS),
    "instructions": (InstructionsTask(), INSTRUCTION_ROWS),
    "free": (FreeTask(), FREE_ROWS),
}


def found(kind):
    task, rows = CASES[kind]
    return score(task, rows, draws=50)


def test_every_kind_of_task_has_metrics():
    assert set(METRICS) == set(TASKS) == set(CASES)


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_results_are_json_with_the_common_part_and_a_headline(kind):
    task, rows = CASES[kind]
    results = found(kind)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
    assert results["kind"] == kind
    assert results["n"] == len(rows)
    assert results["patients"] == len({row["patient"] for row in rows})
    assert results["fail_rate"] == sum(not row["valid"] for row in rows) / len(rows)
    assert (results["draws"], results["level"], results["seed"]) == (50, 0.95, 0)
    name, value, low, high = headline(results)
    assert isinstance(name, str)
    assert low <= value <= high
    assert score(task, rows[::-1], draws=50) == results  # whatever the order of rows


@pytest.mark.parametrize("kind", sorted(TASKS))
def test_numbers_agree_with_results(kind):
    task, rows = CASES[kind]
    curve = numbers(task, rows)
    assert (curve["n"], curve["valid"]) == (len(rows), 1 - found(kind)["fail_rate"])
    assert headline(found(kind)).value in curve.values()


def test_labels_by_hand():
    results = found("labels")
    block = results["blocks"]["all"]
    assert block["macro"]["value"] == pytest.approx((0.8 + 0 + 1) / 3)
    assert block["exact_match"] == 1 / 5  # film 3 names something unknown: it is not the empty set
    assert (results["unknown_rate"], results["unknown_names"]) == (0.2, [{"name": "flu", "count": 1}])
    assert results["contradiction_rate"] == 0.2
    assert headline(results).name == "macro-F1"
    assert numbers(LABELS, LABEL_ROWS)["unknown"] == 0.2


def test_labels_of_a_set_that_has_fewer():
    rows = [row("1", "p", ["b"], ["b"]), row("2", "q", [], ["b"])]
    results = score(LABELS, rows, labels=("b",), subsets={"all 1": ("b",)}, draws=20)
    assert results["blocks"]["all 1"]["labels"] == ["b"]
    assert numbers(LABELS, rows, labels=("b",))["macro_f1"] == results["blocks"]["all 1"]["macro"]["value"]
    with pytest.raises(ValueError, match=r"expected truth among .* found \['b'\]"):
        score(LABELS, rows, labels=("a",))


def test_results_of_an_earlier_run_have_a_headline():
    results = {key: value for key, value in found("labels").items() if key != "kind"}
    assert headline(results) == headline(found("labels"))


def test_choice_by_hand():
    results = found("choice")
    assert (results["accuracy"]["value"], results["accuracy"]["n"]) == (0.5, 4)  # row 5 has no truth
    assert results["unanswered"] == 0.2


def test_fields_by_hand():
    results = found("fields")
    single, ordinal, number, several = results["fields"].values()
    assert (single["n"], single["missing"], single["accuracy"]["value"]) == (4, 1, 0.5)
    assert single["macro_f1"]["value"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert [(each["option"], each["support"]) for each in single["per_option"]] == [("x", 2), ("y", 2), ("z", 0)]
    assert (ordinal["n"], ordinal["accuracy"]["value"]) == (3, pytest.approx(1 / 3))
    assert (ordinal["within_one"]["value"], ordinal["mean_steps"]["value"]) == (pytest.approx(2 / 3), 1.0)
    assert (number["n"], number["accuracy"]["value"], number["mean_absolute_error"]["value"]) == (
        3,
        pytest.approx(1 / 3),
        2.0,
    )
    assert number["mean_absolute_error"]["n"] == 2
    assert (several["n"], several["accuracy"]["value"]) == (4, 0.5)
    assert (several["partial"]["value"], several["overlap"]["value"]) == (0.75, (1 + 0.5 + 1 + 0) / 4)
    assert results["accuracy"]["value"] == pytest.approx((2 + 1 + 1 + 2) / 14)
    assert results["all_right"]["value"] == 0.25
    assert numbers(FIELDS, FIELD_ROWS)["accuracy/l"] == 0.5


def test_instructions_by_hand():
    results = found("instructions")
    assert (results["prompts"]["value"], results["prompts"]["n"]) == (pytest.approx(1 / 3), 3)  # row 4 asks for nothing
    assert results["constraints"]["value"] == pytest.approx(3 / 5)
    assert results["by_kind"] == {"bullets": {"n": 2, "share": 0.5}, "words": {"n": 3, "share": pytest.approx(2 / 3)}}


def test_free_by_hand():
    results = found("free")
    assert (results["tokens"]["value"], results["stopped"]["value"]) == (6.0, 0.5)


def test_what_has_no_truth_is_undefined():
    rows = [row("1", "p", None, "A"), row("2", "q", None, "B")]
    assert headline(score(ChoiceTask(), rows, draws=5)) == ("accuracy", None, None, None)
    assert numbers(ChoiceTask(), rows)["accuracy"] is None


def test_rows_are_checked():
    with pytest.raises(ValueError, match="at least one prediction row"):
        score(FreeTask(), [])
    with pytest.raises(ValueError, match=r"row 2 \(id '1'\): expected every film once"):
        score(FreeTask(), [FREE_ROWS[0], FREE_ROWS[0]])
    assert score(FreeTask(), [{**FREE_ROWS[0], "sample": i} for i in range(2)], draws=5)["n"] == 2


def test_an_interval_of_a_share_takes_patients_whole():
    hits, patients = [1, 1, 1, 0], ["p", "p", "p", "q"]
    whole = bootstrap_ratio(hits, [1] * 4, patients, draws=400)
    assert (whole.value, whole.n, whole.patients, whole.undefined) == (0.75, 4, 2, 0)
    assert (whole.low, whole.high) == (0.0, 1.0)  # one patient drawn twice
    alone = bootstrap_ratio(hits, [1] * 4, ["a", "b", "c", "d"], draws=400)
    assert 0 < alone.low < alone.value <= alone.high
    assert bootstrap_ratio(hits, [1] * 4, ["p"] * 4).low is None
    with pytest.raises(ValueError, match="one patient per answer"):
        bootstrap_ratio(hits, [1] * 4, ["p"])
    with pytest.raises(ValueError, match="draws must be >= 1"):
        bootstrap_ratio(hits, [1] * 4, patients, draws=0)


def test_reasoning_is_held_against_the_solution():
    """By label and not by answer; with the task's synonyms; among the labels of the set; and only where there is any."""
    task = LabelsTask(prompt="?", labels=("Edema", "Fracture"), synonyms={"Edema": ("wet lungs",)})
    rows = [
        row("1", "p", [], ["Edema", "Fracture"], reasoning="Wet lungs. No fracture."),
        row("2", "q", [], ["Edema"], reasoning="Edema and a fracture."),
        row("3", "r", [], [], reasoning="", valid=False),
    ]
    named, kept = 2 / 3, 2 / 3
    curve, found = numbers(task, rows), score(task, rows, draws=20)["reasoning"]
    assert (curve["reasoning_named"], curve["reasoning_kept"]) == pytest.approx((named, kept))
    assert (found["named"]["value"], found["kept"]["value"]) == pytest.approx((named, kept))
    assert (found["named"]["n"], found["kept"]["n"]) == (2, 2)
    narrow = [{**each, "predicted": [label for label in each["predicted"] if label == "Edema"]} for each in rows]
    assert numbers(task, narrow, labels=("Edema",))["reasoning_named"] == 1
    plain = LabelsTask(prompt="?", labels=("Edema", "Fracture"), form="solution")
    for own, lines in ((plain, rows), (task, [row("1", "p", [], ["Edema"])])):
        assert "reasoning" not in score(own, lines, draws=20)
        assert "reasoning_named" not in numbers(own, lines)
