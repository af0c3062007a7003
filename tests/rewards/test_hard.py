"""The hard reward follows its printed cases, including the trap that breaking the form can pay."""

import doctest

import pytest

from vlmalign.rewards import hard
from vlmalign.rewards.hard import Breakdown, HardReward

LABELS = ("Fracture", "Edema", "No Finding")
LONG, SHORT = 250, 249


def answer(solution: str) -> str:
    return f"<think>x</think><solution>{solution}</solution>"


def test_examples_in_the_documentation_hold():
    assert doctest.testmod(hard).failed == 0


@pytest.mark.parametrize(
    ("text", "truth", "tokens", "expected"),
    [
        # text                              truth                 tokens  valid  J     penalty  total
        (answer("Edema"), ["Edema"], LONG, (True, 1.0, 0.0, 1.0)),
        (answer("Edema"), ["Edema"], SHORT, (True, 1.0, 0.2, 0.8)),
        (answer("Edema, Fracture"), ["Edema"], LONG, (True, 0.5, 0.0, 0.5)),
        (answer("Edema, Fracture"), ["Edema", "No Finding"], LONG, (True, 1 / 3, 0.0, 1 / 3)),
        (answer("Edema"), ["Fracture"], LONG, (True, 0.0, 0.0, 0.0)),
        (answer("Edema"), ["Fracture"], SHORT, (True, 0.0, 0.2, -0.2)),
        (answer(""), [], LONG, (True, 1.0, 0.0, 1.0)),  # both empty
        (answer(""), ["Edema"], LONG, (True, 0.0, 0.0, 0.0)),
        (answer("Edema"), [], LONG, (True, 0.0, 0.0, 0.0)),
        (answer("Edema, Flu"), ["Edema"], LONG, (True, 1.0, 0.0, 1.0)),  # unknown names are filtered out
        (answer("Edema, Edema"), ["Edema"], LONG, (True, 1.0, 0.0, 1.0)),
        (answer("Flu"), [], LONG, (True, 0.0, 0.0, 0.0)),  # unknown names alone are not the empty set
        (answer("Flu"), ["Edema"], SHORT, (True, 0.0, 0.2, -0.2)),
        (answer("none"), [], LONG, (True, 1.0, 0.0, 1.0)),
        (answer("- edema\n- **Fracture**."), ["Edema", "Fracture"], LONG, (True, 1.0, 0.0, 1.0)),
        ("Edema", ["Edema"], LONG, (False, 0.0, 0.0, 0.0)),
        ("Edema", ["Edema"], SHORT, (False, 0.0, 0.0, 0.0)),
        ("", [], SHORT, (False, 0.0, 0.0, 0.0)),  # no J = 1 for saying nothing at all
    ],
)
def test_every_case_worked_by_hand(text, truth, tokens, expected):
    assert HardReward(LABELS).score(text, truth=truth, completion_tokens=tokens) == Breakdown(*expected)


def test_trap_a_valid_short_wrong_answer_scores_below_a_broken_one():
    reward = HardReward(LABELS)
    wrong = reward.score(answer("Edema"), truth=["Fracture"], completion_tokens=SHORT)
    broken = reward.score("Edema", truth=["Fracture"], completion_tokens=SHORT)
    assert wrong.total == -0.2 < broken.total == 0.0


@pytest.mark.parametrize(("min_tokens", "total"), [(0, 1.0), (10, 1.0), (11, 0.5)])
def test_length_term_is_set_by_its_two_fields(min_tokens, total):
    reward = HardReward(LABELS, min_tokens=min_tokens, lambda_len=0.5)
    assert reward.score(answer("Edema"), truth=["Edema"], completion_tokens=10).total == total


def test_called_as_trl_calls_it_it_gives_the_totals():
    rewards = HardReward(LABELS)(
        prompts=["p", "p", "q"],
        completions=[answer("Edema"), "Edema", answer("Edema")],
        completion_ids=[[1], [2], [3]],
        truth=[["Edema"], ["Edema"], ["Fracture"]],
        completion_tokens=[LONG, LONG, SHORT],
        trainer_state=None,
    )
    assert rewards == [1.0, 0.0, -0.2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_tokens": -1}, "min_tokens must be >= 0 tokens, found -1; set 0"),
        ({"lambda_len": -0.1}, r"lambda_len must lie in \[0, 1\].*found -0.1; set"),
        ({"lambda_len": 1.5}, "found 1.5"),
        ({"lambda_len": float("nan")}, "found nan"),
        ({"labels": ()}, "at least one name"),
    ],
)
def test_fields_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        HardReward(**({"labels": LABELS} | fields))


def test_rows_that_cannot_be_scored_are_refused():
    reward = HardReward(LABELS)
    with pytest.raises(ValueError, match=r"found \['Flu'\]; map or drop"):
        reward.score(answer("Edema"), truth=["Flu"], completion_tokens=LONG)
    with pytest.raises(ValueError, match=r"found \['Flu'\]"):  # also where the completion is broken
        reward.score("", truth=["Flu"], completion_tokens=LONG)
    with pytest.raises(ValueError, match="completion_tokens must be >= 0, found -1"):
        reward.score(answer("Edema"), truth=["Edema"], completion_tokens=-1)
