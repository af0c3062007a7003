"""The contract of every reward in the tables; a new reward adds one line to `BUILT` and inherits these tests."""

import copy
import json
import math
import pickle
import subprocess
import sys

import pytest

from vlmalign.rewards.choice import ChoiceReward
from vlmalign.rewards.collapse import label_collapse
from vlmalign.rewards.constraints import ConstraintShare
from vlmalign.rewards.contract import MemoryReward, Row, required_columns
from vlmalign.rewards.contradiction import Contradiction
from vlmalign.rewards.form import FormatReward
from vlmalign.rewards.hard import HardReward
from vlmalign.rewards.json_answer import JsonReward
from vlmalign.rewards.labels import LabelOverlap
from vlmalign.rewards.length import LengthBand
from vlmalign.rewards.macro_f1 import MacroF1Gain
from vlmalign.rewards.nuanced import NuancedReward
from vlmalign.rewards.pattern import PatternReward
from vlmalign.rewards.repetition import RepetitionPenalty
from vlmalign.rewards.rewards import REWARD_SETS, REWARDS, REWARDS_WITH_MEMORY, SET_PARTS
from vlmalign.rewards.robust import RobustOverlap
from vlmalign.rewards.runner import RewardRunner

LABELS = ("Fracture", "Edema", "No Finding")
BUILT = {
    "choice": lambda: ChoiceReward(),
    "constraints": lambda: ConstraintShare(),
    "contradiction": lambda: Contradiction(LABELS, "No Finding"),
    "format": lambda: FormatReward(alone=True),
    "hard": lambda: HardReward(LABELS, min_tokens=10),
    "json": lambda: JsonReward({"type": "object", "required": ["drug"]}),
    "labels": lambda: LabelOverlap(LABELS, measure="f1", normal="No Finding"),
    "length": lambda: LengthBand(low=10, high=300, high_ramp=100),
    "macro_f1": lambda: MacroF1Gain(LABELS, frequency={"Fracture": 0.1, "Edema": 0.3, "No Finding": 0.4}),
    "nuanced": lambda: NuancedReward(LABELS, frequency=(0.1, 0.3, 0.4)),
    "pattern": lambda: PatternReward(r"(?i)\bedema\b"),
    "repetition": lambda: RepetitionPenalty(n=2),
    "robust": lambda: RobustOverlap(LABELS, {"nine": "chexpert9"}),
}
WITH_MEMORY = {"collapse": lambda: label_collapse(LABELS, window=2, share=0.5)}

COLUMNS = {
    "prompts": ["p"] * 8,
    "completions": [
        "<think>x</think><solution>Edema</solution>",
        "<think>x</think><solution>Edema, edema, No Finding, Flu</solution> and so on",
        "<think>x</think><solution></solution>",
        "<think>never closed",
        "",
        "\x00 ü ﷽ </solution><think>" * 50,
        '{"drug": "hCG"}',
        "The answer is B.",
    ],
    "truth": [["Edema"], ["Fracture"], [], ["Edema"], [], ["No Finding"], ["Edema"], []],
    "answer": ["A", "ABD", None, "E", "C", "B", "A", "B"],
    "constraints": [[], [{"kind": "json"}], None, [{"kind": "words", "high": 5}, {"kind": "bullets"}], *[[]] * 4],
    "completion_tokens": [12, 9, 10, 400, 0, 900, 4, 5],
    "completion_ids": [[7] * 12, [1, 2] * 4 + [3], list(range(10)), [5] * 400, [], [1, 2, 3] * 300, [1] * 4, [2] * 5],
}


def test_every_reward_is_under_contract():
    assert set(BUILT) == set(REWARDS)
    assert set(WITH_MEMORY) == set(REWARDS_WITH_MEMORY)


@pytest.fixture(params=sorted(REWARDS))
def reward(request):
    built = BUILT[request.param]()
    assert type(built) is REWARDS[request.param]
    return built


def test_one_finite_number_or_none_per_completion(reward):
    rewards = reward(**COLUMNS)
    assert type(rewards) is list
    assert len(rewards) == 8
    assert all(value is None or (type(value) is float and math.isfinite(value)) for value in rewards)
    assert len(set(rewards)) > 1  # it tells completions apart


def test_no_completions_give_no_rewards(reward):
    assert reward(**{name: [] for name in COLUMNS}) == []


def test_prompts_and_completions_may_be_positional(reward):
    columns = dict(COLUMNS)
    assert reward(columns.pop("prompts"), columns.pop("completions"), **columns) == reward(**COLUMNS)


def test_columns_it_does_not_know_change_nothing(reward):
    assert reward(**COLUMNS, patient=list("abcdefgh"), trainer_state=None) == reward(**COLUMNS)


def test_it_needs_the_columns_it_names_and_no_others(reward):
    needs = required_columns(reward, "reward")
    assert set(needs) <= set(COLUMNS)
    columns = {name: COLUMNS[name] for name in ("prompts", "completions", *needs)}
    assert reward(**columns) == reward(**COLUMNS)


def test_messages_are_scored_as_their_text(reward):
    messages = [[{"role": "assistant", "content": text}] for text in COLUMNS["completions"]]
    assert reward(**(COLUMNS | {"completions": messages})) == reward(**COLUMNS)


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


def test_columns_of_unequal_length_are_refused(reward):
    for short in required_columns(reward, "reward"):
        with pytest.raises(ValueError, match="one entry per completion, found"):
            reward(**(COLUMNS | {short: COLUMNS[short][:-1]}))


def test_all_of_them_in_worker_processes_agree_with_this_one():
    rewards = {name: (build(), 1.0) for name, build in BUILT.items()}
    rewards |= {name: (build(), 1.0) for name, build in WITH_MEMORY.items()}
    columns = dict(COLUMNS)
    prompts, completions = columns.pop("prompts"), columns.pop("completions")
    with RewardRunner(rewards, workers=0) as here, RewardRunner(rewards, workers=1, chunk=3) as there:
        scored = here.score(prompts, completions, columns)
        assert there.score(prompts, completions, columns) == scored
    assert scored.faults == ()
    assert list(scored.parts) == list(rewards)
    assert all(scored.parts[name] == build()(**COLUMNS) for name, build in BUILT.items())


# Rewards with memory

ROWS = [Row("p", text, {}) for text in COLUMNS["completions"]]


@pytest.fixture(params=sorted(REWARDS_WITH_MEMORY))
def remembering(request):
    return WITH_MEMORY[request.param]()


def test_a_pair_gives_rewards_and_a_json_state(remembering):
    assert isinstance(remembering, MemoryReward)
    state = remembering.init()
    for _ in range(3):
        rewards, state = remembering.update(ROWS, state)
        assert len(rewards) == 8
        assert all(value is None or (type(value) is float and math.isfinite(value)) for value in rewards)
        assert json.loads(json.dumps(state)) == state


def test_a_pair_is_pure(remembering):
    _, state = remembering.update(ROWS, remembering.init())
    again = json.dumps(state)
    first = remembering.update(ROWS, json.loads(again))
    remembering.update(ROWS[:2], json.loads(again))
    assert remembering.update(ROWS, json.loads(again)) == first


# Published sets


@pytest.mark.parametrize("name", sorted(REWARD_SETS))
def test_a_set_goes_into_a_runner_as_it_is(name):
    columns = dict(COLUMNS)
    prompts, completions = columns.pop("prompts"), columns.pop("completions")
    frequency = {} if name.startswith("nv") else {"frequency": (0.1, 0.3, 0.4)}
    built = REWARD_SETS[name](LABELS, **frequency)
    assert tuple(built) == SET_PARTS[name]
    with RewardRunner(built, workers=0) as runner:
        scored = runner.score(prompts, completions, columns)
    assert scored.faults == ()
    assert None not in scored.rewards


def test_rewards_start_without_an_array_library():
    """Worker processes import this room: seconds and gigabytes each if it brought JAX along."""
    code = "import sys, vlmalign.rewards.rewards, vlmalign.rewards.worker; print({'jax', 'numpy'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
