"""Two systems compared: rare labels are never tested, and the p-values of each printed family are adjusted together."""

import numpy as np
import pytest
from sklearn.metrics import jaccard_score

from vlmalign.evaluation.bootstrap import holm, paired_difference
from vlmalign.evaluation.comparison import FEWEST, adjust, compare
from vlmalign.evaluation.f1 import label_matrix
from vlmalign.evaluation.results import evaluate_predictions

LABELS = ("often", "ten", "nine", "never")


def systems():
    """60 films: 30 positives of the first label, 10 of the second, 9 of the third; the second system answers all right."""
    truth = [[name for name, least in (("often", 30), ("ten", 10), ("nine", 9)) if film < least] for film in range(60)]
    rng = np.random.default_rng(0)
    first = [[name for name in LABELS[:3] if rng.random() < 0.3] for _ in truth]
    rows = [
        [
            {"id": str(i), "patient": str(i // 2), "truth": true, "predicted": told, "valid": True}
            for i, (true, told) in enumerate(zip(truth, answers, strict=True))
        ]
        for answers in (first, truth)
    ]
    return rows


def test_labels_with_fewer_than_ten_positives_are_shown_and_not_tested():
    first, second = systems()
    whole, shared = compare(first, second, {"all 4": LABELS, "shared 2": ("often", "nine")}, draws=199, seed=3)
    assert FEWEST == 10
    assert [(row["label"], row["support"], row["f1"]["p"] is not None) for row in whole["labels"]] == [
        ("often", 30, True), ("ten", 10, True), ("nine", 9, False), ("never", 0, False),
    ]  # fmt: skip
    assert whole["labels"][2]["f1"]["low"] > 0
    assert "labels" not in shared
    truth, one, two = (
        label_matrix([row[key] for row in rows], LABELS)
        for rows, key in ((first, "truth"), (first, "predicted"), (second, "predicted"))
    )
    plain = paired_difference(truth, one, two, [row["patient"] for row in first], draws=199, seed=3)
    assert whole["macro"] == plain.macro._asdict()
    assert whole["micro"] == plain.micro._asdict()
    assert whole["labels"][1]["f1"] == plain.label[1]._asdict()


def test_the_printed_differences_are_two_families():
    first, second = systems()
    found = [*compare(first, second, {"all": LABELS}, draws=199), *compare(first, first, {"all": LABELS}, draws=199)]
    tests = adjust(found, draws=199)
    assert tests == {
        "correction": "Holm", "families": {"averages": 4, "labels": 4}, "smallest_p": 0.01, "fewest_positives": 10,
    }  # fmt: skip
    averages = [row[name] for row in found for name in ("macro", "micro")]
    assert [each["p_holm"] for each in averages] == holm([each["p"] for each in averages])
    assert averages[0]["p_holm"] == 0.04  # the smallest p that 199 draws give, times the four tests
    labels = [label["f1"] for row in found for label in row["labels"]]
    tested = [each for each in labels if "p_holm" in each]
    assert [each["p_holm"] for each in tested] == holm([each["p"] for each in tested])
    assert len(tested) == 4


def test_nothing_to_compare_is_an_empty_family():
    assert adjust([], draws=99)["families"] == {"averages": 0, "labels": 0}


def test_the_mean_jaccard_of_films_is_scikit_learns_and_its_difference_is_not_tested():
    first, second = systems()
    first[0] |= {"predicted": [], "valid": False}
    found = compare(first, second, {"all": LABELS}, draws=199)[0]["jaccard"]
    truth, one, two = (
        label_matrix([row[key] for row in rows], LABELS)
        for rows, key in ((first, "truth"), (first, "predicted"), (second, "predicted"))
    )
    before, after = (jaccard_score(truth, told, average="samples", zero_division=1.0) for told in (one, two))
    assert found["value"] == pytest.approx(after - before)
    assert 0 < found["low"] < found["value"] < found["high"]
    results = evaluate_predictions(first, LABELS, draws=199)["blocks"]["all"]["jaccard"]
    assert results["value"] == pytest.approx(before)
    assert "p" not in found


def test_an_answer_that_says_nothing_shares_nothing_even_where_nothing_is_true():
    rows = [
        {"id": "a", "patient": "a", "truth": [], "predicted": [], "valid": False},
        {"id": "b", "patient": "b", "truth": [], "predicted": [], "valid": True, "unknown": ["flu"]},
        {"id": "c", "patient": "c", "truth": [], "predicted": [], "valid": True},
        {"id": "d", "patient": "d", "truth": ["often", "ten"], "predicted": ["ten", "nine"], "valid": True},
    ]
    assert evaluate_predictions(rows, LABELS, draws=9)["blocks"]["all"]["jaccard"]["value"] == pytest.approx(
        (1 + 1 / 3) / 4
    )
