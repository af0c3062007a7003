"""The contract of every reward in the table; a new reward adds one line to `BUILT` and inherits these tests."""

import copy
import math
import pickle
import subprocess
import sys

import pytest

from vlmalign.rewards.hard import HardReward
from vlmalign.rewards.rewards import REWARDS

LABELS = ("Fracture", "Edema", "No Finding")
BUILT = {"hard": lambda: HardReward(LABELS, min_tokens=10)}

COLUMNS = {
    "prompts": ["p"] * 6,
    "completions": [
        "<think>x</think><solution>Edema</solution>",
        "<think>x</think><solution>Edema, edema, Flu</solution> and so on",
        "<think>x</think><solution></solution>",
        "<think>never closed",
        "",
        "\x00 ü ﷽ </solution><think>" * 50,
    ],
    "truth": [["Edema"], ["Fracture"], [], ["Edema"], [], ["No Finding"]],
    "completion_tokens": [12, 9, 10, 400, 0, 900],
}


def test_every_reward_is_under_contract():
    assert set(BUILT) == set(REWARDS)


@pytest.fixture(params=sorted(REWARDS))
def reward(request):
    return BUILT[request.param]()


def test_one_finite_number_or_none_per_completion(reward):
    rewards = reward(**COLUMNS)
    assert type(rewards) is list
    assert len(rewards) == 6
    assert all(value is None or (type(value) is float and math.isfinite(value)) for value in rewards)


def test_no_completions_give_no_rewards(reward):
    assert reward(**{name: [] for name in COLUMNS}) == []


def test_prompts_and_completions_may_be_positional(reward):
    columns = dict(COLUMNS)
    assert reward(columns.pop("prompts"), columns.pop("completions"), **columns) == reward(**COLUMNS)


def test_columns_it_does_not_know_change_nothing(reward):
    assert reward(**COLUMNS, patient=list("abcdef"), trainer_state=None) == reward(**COLUMNS)


def test_a_completion_is_scored_alone_whatever_its_neighbours(reward):
    alone = [
        reward(**{name: column[i : i + 1] for name, column in COLUMNS.items()})[0]
        for i in range(len(COLUMNS["prompts"]))
    ]
    backwards = reward(**{name: column[::-1] for name, column in COLUMNS.items()})
    assert alone == reward(**COLUMNS) == backwards[::-1]


def test_arguments_are_left_alone_and_a_second_call_agrees(reward):
    before = copy.deepcopy(COLUMNS)
    assert reward(**COLUMNS) == reward(**COLUMNS)
    assert before == COLUMNS


def test_it_travels_to_a_worker_process(reward):
    assert pickle.loads(pickle.dumps(reward))(**COLUMNS) == reward(**COLUMNS)


def test_the_breakdown_adds_up_to_the_reward(reward):
    rows = zip(COLUMNS["completions"], COLUMNS["truth"], COLUMNS["completion_tokens"], strict=True)
    totals = [reward.score(text, truth=truth, completion_tokens=length).total for text, truth, length in rows]
    assert totals == reward(**COLUMNS)


@pytest.mark.parametrize("short", ["completions", "truth", "completion_tokens"])
def test_columns_of_unequal_length_are_refused(reward, short):
    with pytest.raises(ValueError, match="one entry per completion, found"):
        reward(**(COLUMNS | {short: COLUMNS[short][:-1]}))


def test_rewards_start_without_an_array_library():
    """Worker processes import this room: seconds and gigabytes each if it brought JAX along."""
    code = "import sys, vlmalign.rewards.rewards; print({'jax', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
