"""Rewards that know how frequent labels are: by hand, against scikit-learn, and what they make an optimal answer."""

import itertools

import numpy as np
import pytest
from sklearn.metrics import f1_score, jaccard_score

from vlmalign.rewards.frequency import counted
from vlmalign.rewards.hard import HardReward
from vlmalign.rewards.labels import LabelOverlap
from vlmalign.rewards.macro_f1 import MacroF1Gain
from vlmalign.rewards.nuanced import NuancedReward

LABELS = ("Fracture", "Edema", "Pneumonia", "No Finding")
FREQUENCY = {"Edema": 0.25, "Fracture": 0.05, "No Finding": 0.4, "Pneumonia": 0.1}  # weights 4, 20, 2.5, 10
SETS = [tuple(itertools.compress(LABELS, bits)) for bits in itertools.product([0, 1], repeat=len(LABELS))]


def answer(solution):
    return f"<think>x</think><solution>{solution}</solution>"


@pytest.mark.parametrize(
    ("solution", "truth", "jaccard", "f1"),
    [
        ("Fracture", ["Fracture", "Edema"], 20 / 24, 40 / 44),
        ("Edema", ["Fracture", "Edema"], 4 / 24, 8 / 28),
        ("Edema, No Finding", ["Edema"], 4 / 6.5, 8 / 10.5),
        ("Edema, Fracture", ["Edema"], 4 / 24, 8 / 28),
        ("Edema", ["Edema"], 1.0, 1.0),  # alone, a frequent label is worth as much as a rare one
        ("Fracture", ["Fracture"], 1.0, 1.0),
        ("", [], 1.0, 1.0),
        ("", ["Edema"], 0.0, 0.0),
        ("Edema", [], 0.0, 0.0),
        ("Flu", [], 0.0, 0.0),
    ],
)
def test_overlap_weighted_by_inverse_frequency(solution, truth, jaccard, f1):
    for measure, expected in (("jaccard", jaccard), ("f1", f1)):
        fields = {"measure": measure, "frequency": FREQUENCY}
        assert LabelOverlap(LABELS, **fields).score(answer(solution), truth=truth) == pytest.approx(expected, rel=1e-12)
        hard = HardReward(LABELS, **fields).score(answer(solution), truth=truth, completion_tokens=250)
        assert hard.total == hard.overlap == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("measure", ["jaccard", "f1"])
def test_both_measures_agree_with_scikit_learn(measure):
    theirs = {"jaccard": jaccard_score, "f1": f1_score}[measure]
    weights = [1 / FREQUENCY[label] for label in LABELS]
    plain, weighted = LabelOverlap(LABELS, measure), LabelOverlap(LABELS, measure, frequency=FREQUENCY)
    for true, found in itertools.product(SETS[::2], SETS[1::2] + SETS[:1]):  # [::2]: without "No Finding"
        y, p = ([label in each for label in LABELS] for each in (true, found))
        scored = [each.score(answer(", ".join(found)), truth=true) for each in (plain, weighted)]
        wanted = [theirs(y, p, zero_division=1.0, sample_weight=each) for each in (None, weights)]
        assert scored == pytest.approx(wanted, rel=1e-12)


def test_equal_frequencies_weigh_nothing():
    for true, found in itertools.product(SETS, SETS):
        text = answer(", ".join(found))
        weighted = LabelOverlap(LABELS, frequency=(0.5,) * 4).score(text, truth=true)
        assert weighted == pytest.approx(LabelOverlap(LABELS).score(text, truth=true), rel=1e-12)


def test_a_label_that_no_film_has_counts_as_the_rarest_that_is_allowed():
    reward = LabelOverlap(LABELS, frequency=(0.0, 0.5, 0.5, 0.5), rarest=0.25)
    assert reward.score(answer("Fracture, Edema"), truth=["Edema"]) == 2 / 6


def test_frequency_is_counted_over_films_that_have_a_truth():
    truth = [["Edema"], ["Edema", "Fracture"], None, [], ["No Finding"]]
    assert counted(LABELS, truth) == {"Fracture": 0.25, "Edema": 0.5, "Pneumonia": 0.0, "No Finding": 0.25}
    with pytest.raises(ValueError, match="found none; give the shares"):
        counted(LABELS, [None])


def test_a_mapping_is_read_by_name_a_list_by_place():
    by_place = tuple(FREQUENCY[label] for label in LABELS)
    text = answer("Edema, Fracture, No Finding")
    for build in (
        lambda frequency: NuancedReward(LABELS, frequency),
        lambda frequency: MacroF1Gain(LABELS, frequency),
        lambda frequency: LabelOverlap(LABELS, frequency=frequency),
    ):
        assert build(FREQUENCY).score(text, truth=["Fracture"]) == build(by_place).score(text, truth=["Fracture"])


# The reward that moves as macro-F1 does


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        (answer("Fracture"), ["Fracture"], 20 * 0.75 / 4),
        (answer("Fracture"), ["Edema"], -20 * 0.25 / 4),
        (answer("No Finding"), ["No Finding"], 2.5 * 0.75 / 4),
        (answer("Edema, Fracture"), ["Edema"], (4 * 0.75 - 20 * 0.25) / 4),
        (answer(""), ["Edema"], 0.0),
        (answer(""), [], 0.0),
        (answer("Flu"), [], 0.0),
        (answer("Edema, edema"), ["Edema"], 4 * 0.75 / 4),
        ("Edema", ["Edema"], -1.0),
    ],
)
def test_macro_f1_gain_by_hand(text, truth, expected):
    assert MacroF1Gain(LABELS, FREQUENCY).score(text, truth=truth) == pytest.approx(expected, rel=1e-12)


def test_a_row_of_another_task_has_no_gain():
    assert MacroF1Gain(LABELS, FREQUENCY)(["p"], [answer("Edema")], truth=[None]) == [None]


def test_macro_f1_gain_is_the_change_of_macro_f1():
    """N films on which every label has F1 = level and as many predictions as truths; one prediction is changed."""
    films, level = 4000, 0.6
    counts = {label: round(films * FREQUENCY[label]) for label in LABELS}
    true, found = np.zeros((2, films, len(LABELS)), bool)
    for i, count in enumerate(counts.values()):
        true[:count, i] = True
        found[round(count * (1 - level)) : round(count * (2 - level)), i] = True
    before = f1_score(true, found, average="macro")
    assert before == pytest.approx(level)
    reward = MacroF1Gain(LABELS, FREQUENCY, level=level)
    for i, label in enumerate(LABELS):
        for film, truth in ((0, [label]), (films - 1, [])):  # a true label that was missed, a false one
            changed = found.copy()
            changed[film, i] = True
            gained = films * (f1_score(true, changed, average="macro") - before)
            assert reward.score(answer(label), truth=truth) == pytest.approx(gained, rel=0.01)


def best_answers(reward, probability):
    """For every film, the set of labels with the highest expected reward where labels hold independently."""
    bits = np.array([[label in each for label in LABELS] for each in SETS])
    table = np.array([[reward.score(answer(", ".join(found)), truth=true) for found in SETS] for true in SETS])
    chance = np.where(bits, probability[:, None], 1 - probability[:, None]).prod(axis=2)  # [film, truth]
    return bits[(chance @ table).argmax(axis=1)]


def test_who_maximises_it_has_the_higher_macro_f1():
    """Films whose labels are known with a probability. Weights within a film leave the best answers much as they are."""
    rng = np.random.default_rng(0)
    offset = np.array([-4.6, -1.9, -3.5, -0.7])  # about FREQUENCY on average
    probability = 1 / (1 + np.exp(-(offset + 2 * rng.normal(size=(6000, 4)))))
    true = rng.random(probability.shape) < probability
    shares = tuple(true.mean(axis=0).tolist())
    rewards = {
        "jaccard": LabelOverlap(LABELS),
        "weighted": LabelOverlap(LABELS, frequency=shares),
        "f1": LabelOverlap(LABELS, measure="f1"),
        "weighted f1": LabelOverlap(LABELS, measure="f1", frequency=shares),
        "gain": MacroF1Gain(LABELS, shares),
    }
    macro = {
        name: f1_score(true, best_answers(reward, probability), average="macro") for name, reward in rewards.items()
    }
    # `docs/rewards.md` quotes them.
    expected = {"jaccard": 0.538, "weighted": 0.540, "f1": 0.548, "weighted f1": 0.545, "gain": 0.580}
    assert macro == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LabelOverlap(LABELS, frequency=(0.1,)), r"a share in \[0, 1\] for each"),
        (lambda: LabelOverlap(LABELS, frequency=(0.1, 0.1, 0.1, 1.1)), r"a share in \[0, 1\] for each"),
        (lambda: LabelOverlap(LABELS, frequency={**FREQUENCY, "Flu": 0.1}), "'Flu' is no label"),
        (lambda: HardReward(LABELS, frequency={"Edema": 0.1}), "'Fracture' has no share"),
        (lambda: HardReward(LABELS, measure="dice"), "jaccard or f1, found 'dice'"),
        (lambda: HardReward(LABELS, rarest=0.0), r"rarest .* \(0, 1\], found 0.0"),
        (lambda: LabelOverlap(LABELS, frequency=(0.1,) * 4, count_unknown=True), "an unknown name has no frequency"),
        (lambda: NuancedReward(LABELS).score(answer("Edema"), truth=[]), "counted by a study; outside of one give"),
        (lambda: MacroF1Gain(LABELS, FREQUENCY, level=1.5), r"\[0, 1\], found 1.5"),
        (lambda: MacroF1Gain(LABELS, FREQUENCY, invalid=-1), "invalid is a price"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
