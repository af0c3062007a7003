"""The ready-made rewards, case by case by hand, and in parity with TRL where TRL has the same one."""

import pickle
import time

import pytest

from vlmalign.rewards.choice import ChoiceReward
from vlmalign.rewards.collapse import label_collapse
from vlmalign.rewards.constraints import ConstraintShare
from vlmalign.rewards.contract import Row, text_of
from vlmalign.rewards.form import FormatReward
from vlmalign.rewards.hard import HardReward
from vlmalign.rewards.labels import LabelOverlap
from vlmalign.rewards.length import LengthBand
from vlmalign.rewards.nuanced import NuancedReward
from vlmalign.rewards.nv_reason import nv_reason_ct, nv_reason_cxr
from vlmalign.rewards.pattern import PatternReward
from vlmalign.rewards.repetition import RepetitionPenalty
from vlmalign.rewards.runner import RewardRunner
from vlmalign.tasks.choice_letters import choice_letters
from vlmalign.tasks.label_reader import LabelReader

LABELS = ("Fracture", "Edema", "Pneumonia", "No Finding")


def answer(solution):
    return f"<think>x</think>\n<solution>{solution}</solution>"


@pytest.mark.parametrize(
    ("completion", "text"),
    [
        ("Edema", "Edema"),
        ([{"role": "assistant", "content": "Edema"}], "Edema"),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}], "a\nc"),
        ([{"role": "assistant", "content": [{"type": "image"}, {"type": "text", "text": "E"}]}], "E"),
        ([], ""),
    ],
)  # fmt: skip
def test_the_text_of_a_completion(completion, text):
    assert text_of(completion) == text


@pytest.mark.parametrize(
    ("text", "form", "alone"),
    [
        (answer("Edema"), 1.0, 1.0),
        (f"\n {answer('Edema')} \n", 1.0, 1.0),
        (f"Sure! {answer('Edema')}", 1.0, 0.0),
        (answer("Edema").replace("\n", " so "), 1.0, 0.0),
        (f"{answer('Edema')} Done.", 1.0, 0.0),
        (answer("Edema") * 2, 0.0, 0.0),
        ("Edema", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("<solution>Edema</solution>", 0.0, 0.0),
    ],
)
def test_form(text, form, alone):
    assert (FormatReward().score(text), FormatReward(alone=True).score(text)) == (form, alone)


def test_the_form_may_be_another():
    text = "<solution>Edema</solution>"
    assert [FormatReward(form=form).score(text) for form in ("think", "solution", "plain")] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("solution", "truth", "jaccard", "f1"),
    [
        ("Edema", ["Edema"], 1.0, 1.0),
        ("Edema, Fracture", ["Edema"], 1 / 2, 2 / 3),
        ("Edema, Fracture", ["Edema", "Pneumonia"], 1 / 3, 1 / 2),
        ("Edema", ["Fracture"], 0.0, 0.0),
        ("", [], 1.0, 1.0),
        ("", ["Edema"], 0.0, 0.0),
        ("Edema", [], 0.0, 0.0),
        ("Edema, Flu, flu", ["Edema"], 1.0, 1.0),
    ],
)
def test_overlap_of_label_sets(solution, truth, jaccard, f1):
    assert LabelOverlap(LABELS).score(answer(solution), truth=truth) == jaccard
    assert LabelOverlap(LABELS, measure="f1").score(answer(solution), truth=truth) == f1


@pytest.mark.parametrize(
    ("settings", "text", "truth", "expected"),
    [
        ({}, "Edema", ["Edema"], 0.0),
        ({}, f"So: {answer('Edema')}", ["Edema"], 1.0),
        ({"alone": True}, f"So: {answer('Edema')}", ["Edema"], 0.0),
        ({"count_unknown": True}, answer("Edema, Flu, flu"), ["Edema"], 1 / 2),
        ({"normal": "No Finding"}, answer("No Finding"), ["No Finding"], 1.0),
        ({"normal": "No Finding"}, answer("No Finding, Edema"), ["Edema"], 0.0),
        ({"normal": "No Finding", "count_unknown": True}, answer("No Finding, Flu"), ["No Finding"], 0.0),
        ({"normal": "No Finding", "empty_is_normal": True}, answer(""), ["No Finding"], 1.0),
        ({"normal": "No Finding", "empty_is_normal": True}, answer("Flu"), ["No Finding"], 0.0),
        ({}, answer("- **edema**\n- Fracture."), ["Edema", "Fracture"], 1.0),
        ({}, answer("Flu"), [], 0.0),
        ({"measure": "f1"}, answer("Flu"), [], 0.0),
        ({}, answer("none"), [], 1.0),
    ],
)
def test_what_label_overlap_can_be_told(settings, text, truth, expected):
    assert LabelOverlap(LABELS, **settings).score(text, truth=truth) == expected


@pytest.mark.parametrize("built", [
    lambda reader: HardReward(reader, min_tokens=0),
    lambda reader: LabelOverlap(reader, alone=True),
    lambda reader: NuancedReward(reader, FREQUENCY),
])  # fmt: skip
def test_label_rewards_take_a_tasks_reader_in_place_of_the_names(built):
    reader = LabelReader(LABELS, (("Edema", ("oedema",)),), "solution")
    columns = {"truth": [["Edema"]], "completion_tokens": [9]}
    here, there = built(reader), pickle.loads(pickle.dumps(built(reader)))
    told, plain = ["<solution>Oedema.</solution>"], [answer("Edema")]
    assert here(["p"], told, **columns) == there(["p"], told, **columns) == built(LABELS)(["p"], plain, **columns)
    assert built(LABELS)(["p"], told, **columns) != here(["p"], told, **columns)


def test_a_label_row_of_another_task_has_no_reward():
    assert LabelOverlap(LABELS)(["p"] * 2, [answer("Edema")] * 2, truth=[None, ["Edema"]]) == [None, 1.0]


CHOICES = [
    # nothing but letters
    ("B", "B"), ("b", "B"), ("(C)", "C"), ("**D**", "D"), ("E.", "E"), ("A, C and D", "ACD"), ("BCA", "ABC"), ("a、c", "AC"),
    # stated
    ("The answer is B.", "B"), ("The answer is (C)", "C"), ("Answer: **D**", "D"), ("**Answer:** D", "D"),
    ("So the correct option is E, not A.", "E"), ("\\boxed{B}", "B"), ("$\\boxed{\\text{C}}$", "C"),
    ("The answer is A? No: the answer is C.", "C"), ("答案：B", "B"), ("答案为D。", "D"), ("故选ABD", "ABD"), ("因此选择 C 。", "C"),
    ("The correct answers are A and C.", "AC"), ("A looks tempting, but the answer is B", "B"), ("I choose option D.", "D"),
    ("The answer is A because of the fever.", "A"), ("Answer: A, since B is rare", "A"), ("answer is\n\n**(E)** Warfarin", "E"),
    ("The answer is B and Borrelia", "B"), ("The answer is not B, the answer is D", "D"),
    # leading
    ("B. Digoxin", "B"), ("(B) Digoxin, as in C", "B"), ("**A**: because B fails", "A"), ("C: x", "C"), ("D\nsince A is wrong", "D"),
    # alone
    ("It must be B", "B"), ("I think it's B because B fits", "B"),
    # regions
    ("<think>The answer is A.</think><solution>B</solution>", "B"), ("<think>Answer: A</think> so B", "B"), ("<think>Answer: A", "A"),
    # guesses
    ("", None), ("A or B", None), ("It could be A, or it could be B.", None), ("It is not B", None), ("B is wrong", None),
    ("A patient with fever", None), ("Vitamin B12 and hepatitis-B", None), ("The answer is a mystery", None), ("The answer is Borrelia", None),
    ("F", None), ("answer: Z", None), ("CABG", None), ("不是B", None), ("digoxin", None), ("Answer: A bacterium of the gut", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "letters"), CHOICES)
def test_choice_letters(text, letters):
    assert choice_letters(text) == letters


@pytest.mark.parametrize(
    ("text", "right", "expected"),
    [("B", "B", 1.0), ("B", "A", 0.0), ("DBA", "ABD", 1.0), ("AB", "ABD", 0.0), ("AB", "A", 0.0), ("?", "A", 0.0)],
)
def test_a_choice_is_right_or_not(text, right, expected):
    assert ChoiceReward().score(text, answer=right) == expected
    assert ChoiceReward()(["p"] * 2, [text] * 2, answer=[right, None]) == [expected, None]


def test_an_answer_that_is_no_option_is_refused():
    with pytest.raises(ValueError, match="one or more of the letters ABCD, found 'E'"):
        ChoiceReward("ABCD").score("A", answer="E")


@pytest.mark.full
@pytest.mark.parametrize(
    "text",
    [
        "answer is " * 50_000,
        "A, " * 100_000 + "x",
        "(" * 1_000_000,
        "answer" + " " * 1_000_000 + "x",
        "answer A" + " " * 1_000_000 + "x",
        "(" + " *" * 500_000 + "x",
    ],
    ids=["statements", "letters", "brackets", "spaces", "spaces after a letter", "stars"],
)
def test_extraction_takes_linear_time(text, cpu_seconds):
    assert cpu_seconds(lambda: choice_letters(text)) < 5


@pytest.mark.parametrize(
    ("settings", "text", "expected"),
    [
        ({"pattern": r"\d+ mg"}, "take 5 mg now", 1.0),
        ({"pattern": r"\d+ mg", "whole": True}, "take 5 mg now", 0.0),
        ({"pattern": r"\d+ mg", "whole": True, "where": "answer"}, answer("5 mg"), 1.0),
        ({"pattern": r"edema"}, "Edema", 0.0),
        ({"pattern": r"(?i)edema"}, "Edema", 1.0),
        ({"pattern": r"a", "max_chars": 3}, "aaaa", 0.0),
    ],
)
def test_patterns(settings, text, expected):
    assert PatternReward(**settings).score(text) == expected


def test_a_pattern_without_end_is_a_counted_timeout_of_one_completion():
    reward = PatternReward(r"(a|aa)+$", seconds=0.2)
    start = time.monotonic()
    with RewardRunner({"pattern": (reward, 1.0)}, workers=0) as runner:
        scored = runner.score(["p"] * 3, ["aaa", "a" * 60 + "c", "c"], {})
    assert scored.rewards == [1.0, None, 0.0]
    assert scored.counts == {"pattern/timeout": 1}
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("tokens", "expected"), [(0, -1.0), (90, -1.0), (180, -1.0), (181, -0.5), (182, 0.0), (900, 0.0), (1050, -0.5), (9999, -1.0)]
)  # fmt: skip
def test_a_length_band(tokens, expected):
    assert LengthBand(low=182, low_ramp=2, high=900, high_ramp=300).score(tokens) == expected


def test_length_and_repetition_agree_with_trl():
    from trl.rewards.other_rewards import get_repetition_penalty_reward, get_soft_overlong_punishment

    ids = [[], [1], [1, 1], [1, 2, 1, 2, 1, 2], [5] * 80, list(range(90)), [3, 4] * 48, [1] * 100, [1] * 101, [2] * 300]
    prompts, texts = ["p"] * len(ids), [""] * len(ids)
    for n in (1, 2, 3):
        ours = RepetitionPenalty(n=n, weight=0.7)(prompts, texts, completion_ids=ids)
        assert ours == get_repetition_penalty_reward(n, -0.7)(ids)
    ours = LengthBand(high=80, high_ramp=20)(prompts, texts, completion_tokens=[len(row) for row in ids])
    assert ours == get_soft_overlong_punishment(100, 20)(ids)


FREQUENCY = (0.1, 0.3, 0.2, 0.4)


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        # match, partial, false positives, form, total
        (answer("Edema"), ["Edema"], (100, 50, 0, 0, 150)),
        (answer(""), [], (100, 50, 0, 0, 150)),
        (answer("Edema, Fracture"), ["Edema"], (0, 40, 10, 0, 30)),
        (answer("Edema"), ["Edema", "Fracture"], (0, 35, 0, 0, 35)),
        (answer("No Finding"), ["Edema"], (0, 0, 40, 0, -40)),
        (answer(""), ["Edema"], (0, 0, 0, 0, 0)),
        (answer("Edema"), [], (0, 0, 30, 0, -30)),
        (answer("Flu"), [], (0, 0, 0, 100, -100)),  # not the empty set
        (answer("Edema, Flu, Edema"), ["Edema"], (100, 50, 0, 125, 25)),
        (f"So: {answer('Edema')}", ["Edema"], (100, 50, 0, 25, 125)),
        ("Edema", ["Edema"], (0, 0, 0, 100, -100)),
    ],
)
def test_the_nuanced_reward_by_hand(text, truth, expected):
    found = NuancedReward(LABELS, FREQUENCY).score(text, truth=truth)
    assert tuple(found) == pytest.approx(expected, rel=1e-12)
    assert found.total == pytest.approx(found.match + found.partial - found.false_positives - found.form)


def rows(*solutions):
    return [Row("p", answer(solution) if solution is not None else "broken", {}) for solution in solutions]


def test_collapse_prices_the_dominant_label_once_the_window_is_full():
    init, update = label_collapse(LABELS, window=4, share=0.5)
    rewards, state = update(rows("Edema", "Edema", "Edema"), init())
    assert (rewards, state) == ([0.0] * 3, {"window": [["Edema"]] * 3})
    rewards, state = update(rows("Edema", None), state)  # not full yet; a broken completion predicts nothing
    assert (rewards, len(state["window"])) == ([0.0, 0.0], 4)
    # 4 of 4 say Edema, 2 would be allowed: 50 + 30 x 2 for those who say it, in whatever place of the call
    rewards, state = update(rows("Edema", "Fracture", None, "Fracture, Edema", "No Finding"), state)
    assert rewards == [-110.0, 0.0, 0.0, -110.0, 0.0]
    assert state["window"] == [["Edema"], ["Fracture"], ["Fracture", "Edema"], ["No Finding"]]
    # exactly the share is not more than the share
    assert update(rows("Edema"), state)[0] == [0.0]


def test_collapse_reads_as_the_task_does():
    _, update = label_collapse(LabelReader(LABELS, (("Edema", ("oedema",)),)), window=2, share=0.5)
    rewards, state = update(rows("- Oedema."), {"window": [["Edema"], ["Edema"]]})
    assert (rewards, state["window"]) == ([-80.0], [["Edema"], ["Edema"]])


def test_a_collapse_price_for_everyone_is_the_same_for_the_whole_group():
    _, update = label_collapse(LABELS, window=2, share=0.5, everyone=True)
    rewards, _ = update(rows("Edema", "Fracture", None), {"window": [["Edema"], ["Edema"]]})
    assert rewards == [-80.0] * 3


@pytest.mark.parametrize(
    ("constraint", "text", "expected"),
    [
        ({"kind": "json"}, '{"a": 1}', 1.0),
        ({"kind": "json"}, "NaN", 0.0),
        ({"kind": "bullets", "low": 2, "high": 2}, "- a\n * b\ntext - c\n-d", 1.0),
        ({"kind": "bullets"}, "none", 0.0),
        ({"kind": "words", "low": 2, "high": 3}, "one two three", 1.0),
        ({"kind": "words", "high": 2}, "<think>one two three</think> one two", 1.0),
        ({"kind": "words", "high": 2}, "one two three", 0.0),
        ({"kind": "forbidden", "words": ["cure"]}, "a Cure.", 0.0),
        ({"kind": "forbidden", "words": ["cure"]}, "it was obscured", 1.0),
    ],
)
def test_constraints(constraint, text, expected):
    assert ConstraintShare().score(text, constraints=[constraint]) == expected
    assert ConstraintShare().score(text, constraints=[constraint, {"kind": "words", "low": 10**6}]) == expected / 2


def test_published_sets_by_hand():
    texts = [answer("Edema, Flu"), f"So {answer('Edema')}", answer("No Finding, Edema"), answer("")]
    columns = {"truth": [["Edema"], ["Edema"], ["Edema"], ["No Finding"]], "completion_tokens": [400, 100, 1050, 90]}
    with RewardRunner(nv_reason_cxr(LABELS), workers=0) as runner:
        scored = runner.score(["p"] * 4, texts, columns)
    assert scored.parts == {"labels": [1.0, 0.0, 0.5, 0.0], "length": [0.0, -0.75, 0.0, -0.775]}
    assert scored.rewards == [1.0, -0.75, 0.5, -0.775]
    with RewardRunner(nv_reason_ct(LABELS), workers=0) as runner:
        scored = runner.score(["p"] * 4, texts, columns)
    assert scored.parts == {"labels": [2 / 3, 1.0, 0.0, 1.0], "length": [0.0, -80 / 180, -0.5, -0.5]}


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: LabelOverlap(LABELS, measure="dice"), "jaccard or f1, found 'dice'"),
        (lambda: FormatReward(form="json"), "one of think, solution, plain, found 'json'"),
        (lambda: LabelOverlap(LABELS, normal="Healthy"), "one of the labels"),
        (lambda: LabelOverlap(LABELS, empty_is_normal=True), "needs normal"),
        (lambda: LabelOverlap(LABELS).score("", truth=["Flu"]), r"found \['Flu'\]; map or drop"),
        (lambda: ChoiceReward("ABA"), "different capital letters"),
        (lambda: ChoiceReward("ab"), "different capital letters"),
        (lambda: PatternReward("(a"), "does not compile"),
        (lambda: PatternReward("a", where="solution"), "text or answer, found 'solution'"),
        (lambda: PatternReward("a", seconds=0), "must be > 0"),
        (lambda: LengthBand(low=5, high=4, high_ramp=1), "0 <= low <= high, found low=5, high=4"),
        (lambda: LengthBand(high=4), "high and high_ramp go together"),
        (lambda: LengthBand(low=4, low_ramp=0), "low_ramp must be >= 1"),
        (lambda: LengthBand().score(-1), "found -1"),
        (lambda: RepetitionPenalty(n=0), "n >= 1"),
        (lambda: RepetitionPenalty(weight=-1), "weight >= 0"),
        (lambda: NuancedReward(LABELS, (0.1,)), "a share in"),
        (lambda: NuancedReward(LABELS, FREQUENCY, invalid=-1), "invalid is a price"),
        (lambda: NuancedReward(LABELS, FREQUENCY).score("", truth=["Flu"]), r"found \['Flu'\]"),
        (lambda: label_collapse(LABELS, share=1.0), "0 < share < 1"),
        (lambda: ConstraintShare().score("", constraints=[{"kind": "rhyme"}]), "found 'rhyme'"),
        (lambda: ConstraintShare().score("", constraints=[{"kind": "words", "max": 3}]), "wrong arguments"),
        (lambda: ConstraintShare().score("", constraints=[{"kind": "forbidden", "words": "no"}]), "list of words"),
    ],
)
def test_mistakes_are_told(build, message):
    with pytest.raises(ValueError, match=message):
        build()
