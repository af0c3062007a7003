"""Rewards against one label convention, and against contradictions, by hand and by their bounds."""

import itertools
import pickle

import pytest

from vlmalign.rewards.contradiction import Contradiction
from vlmalign.rewards.labels import LabelOverlap
from vlmalign.rewards.robust import RobustOverlap

LABELS = ("No Finding", "Lung Opacity", "Edema", "Fracture")
CONVENTIONS = {"nine": "chexpert9", "parents": {"Edema": ["Edema", "Lung Opacity"]}, "no-bones": {"Fracture": None}}
SETS = [tuple(itertools.compress(LABELS, bits)) for bits in itertools.product([0, 1], repeat=len(LABELS))]


def answer(solution):
    return f"<think>x</think><solution>{solution}</solution>"


@pytest.mark.parametrize(
    ("solution", "truth", "overlaps"),
    [
        # own, nine (No Finding and Edema), parents, no-bones
        ("Edema", ["Edema"], (1, 1, 1, 1)),
        ("Lung Opacity", ["Edema"], (0, 0, 1 / 2, 0)),
        ("Edema, Lung Opacity", ["Edema"], (1 / 2, 1, 1, 1 / 2)),
        ("Fracture", ["Lung Opacity"], (0, 1, 0, 0)),
        ("Edema", ["Edema", "Fracture"], (1 / 2, 1, 2 / 3, 1)),
        ("", ["Fracture"], (0, 1, 0, 1)),
        ("", [], (1, 1, 1, 1)),
        ("Flu", ["Fracture"], (0, 0, 0, 0)),
    ],
)
def test_overlaps_of_every_convention_by_hand(solution, truth, overlaps):
    found = RobustOverlap(LABELS, CONVENTIONS).score(answer(solution), truth=truth)
    assert tuple(found.overlaps) == ("own", *CONVENTIONS)
    assert tuple(found.overlaps.values()) == pytest.approx(overlaps)
    mean = sum(overlaps) / 4
    spread = 0.5 * (sum((each - mean) ** 2 for each in overlaps) / 4) ** 0.5
    assert (found.mean, found.spread, found.total) == pytest.approx((mean, spread, mean - spread))


def test_an_invalid_form_earns_nothing_and_a_row_of_another_task_has_no_reward():
    reward = RobustOverlap(LABELS, CONVENTIONS)
    assert reward(["p"] * 2, ["Edema", answer("Edema")], truth=[["Edema"], None]) == [0.0, None]


@pytest.mark.parametrize("measure", ["jaccard", "f1"])
def test_of_two_conventions_the_worse_one_counts(measure):
    reward = RobustOverlap(LABELS, {"nine": "chexpert9"}, spread=1.0, measure=measure)
    for true, found in itertools.product(SETS, SETS):
        score = reward.score(answer(", ".join(found)), truth=true)
        assert score.total == pytest.approx(min(score.overlaps.values()), abs=1e-12)


def test_a_convention_like_the_schema_leaves_the_plain_overlap():
    reward, plain = RobustOverlap(LABELS, {"same": {}}), LabelOverlap(LABELS)
    for true, found in itertools.product(SETS, SETS):
        text = answer(", ".join(found))
        assert reward.score(text, truth=true).total == pytest.approx(plain.score(text, truth=true))


def test_what_one_convention_alone_rewards_pays_less():
    """A parent named beside its child, as one convention has it: right there, wrong in the other three."""
    reward = RobustOverlap(LABELS, {"parents": CONVENTIONS["parents"]}, spread=1.0)
    true = ["Edema"]
    assert reward.score(answer("Edema, Lung Opacity"), truth=true).total == 0.5
    assert reward.score(answer("Edema"), truth=true).total == 1.0


def test_it_pickles_with_its_conventions():
    reward = RobustOverlap(LABELS, CONVENTIONS)
    assert pickle.loads(pickle.dumps(reward)) == reward


@pytest.mark.parametrize(
    ("solution", "plain", "with_devices"),
    [
        ("No Finding", 0.0, 0.0),
        ("Edema, Support Devices", 0.0, 0.0),
        ("No Finding, Support Devices", -1.0, 0.0),
        ("No Finding, Edema", -1.0, -1.0),
        ("No Finding, Edema, Support Devices", -1.0, -1.0),
        ("No Finding, Flu", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_contradictions(solution, plain, with_devices):
    names = (*LABELS, "Support Devices")
    assert Contradiction(names, "No Finding").score(answer(solution)) == plain
    allowed = Contradiction(names, "No Finding", beside=("Support Devices",))
    assert allowed.score(answer(solution)) == with_devices
    assert allowed.score(solution) == 0.0  # of invalid form


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RobustOverlap(LABELS, {}), "at least one beside the schema itself"),
        (lambda: RobustOverlap(LABELS, {"own": {}}), "own is the schema itself"),
        (lambda: RobustOverlap(LABELS, {"other": "nih"}), "one of chexpert, nih14, chexpert9, found 'nih'"),
        (lambda: RobustOverlap(("Ring", "Veil"), {"other": "nih14"}), "nih14 has none of the labels"),
        (lambda: RobustOverlap(LABELS, {"other": {"Edem": None}}), "conventions.other: unknown label 'Edem'.*Edema"),
        (lambda: RobustOverlap(LABELS, CONVENTIONS, spread=-1), "spread is a price"),
        (lambda: RobustOverlap(LABELS, CONVENTIONS, measure="dice"), "jaccard or f1"),
        (lambda: Contradiction(LABELS, "Healthy"), "one of the labels"),
        (lambda: Contradiction(LABELS, "No Finding", beside=("Flu",)), "found 'Flu'"),
        (lambda: Contradiction(LABELS, "No Finding", beside=("No Finding",)), "other than 'No Finding'"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
