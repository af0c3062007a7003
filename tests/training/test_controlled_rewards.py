"""Rewards under a controller: what is weighted when, across rounds, attempts and a kill; and mistakes in its section."""

import json

import numpy as np
import pytest

from vlmalign.config import ConfigError, load_config
from vlmalign.config_yaml import write_yaml
from vlmalign.control.weights import WeightController
from vlmalign.rewards.runner import ScoredBatch
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.control_config import Control
from vlmalign.training.controlled_rewards import Capability, ControlledRewards

WEIGHTS = {"key": 2.0, "steps": 1.0, "form": 1.0, "logged": 0.0}
CAPABILITIES = {
    "accuracy": Capability({"key": (0.0, 1.0)}),
    "reasoning": Capability({"steps": (-1.0, 1.0), "form": (0.0, 1.0)}),
}


class Given:
    """Stands for the recorded rewards: round -> parts by hand; the total is theirs with the config's weights."""

    def __init__(self, rounds):
        self.rounds, self.state = rounds, {"place": 0}

    def __call__(self, number, keys, prompts, completions, columns):
        parts = self.rounds[number]
        rows = range(len(next(iter(parts.values()))))
        terms = [
            [WEIGHTS[name] * values[row] for name, values in parts.items() if WEIGHTS[name] and values[row] is not None]
            for row in rows
        ]
        return ScoredBatch([sum(each) if each else None for each in terms], parts, ())

    def get_state(self):
        return dict(self.state)

    def set_state(self, state):
        self.state = dict(state)


def parts(key, steps, form):
    return {"key": key, "steps": steps, "form": form, "logged": [9.0] * len(key)}


ROUNDS = [
    parts([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]),
    parts([0.0, 0.0], [None, 0.5], [1.0, 0.0]),
    parts([1.0, 1.0], [1.0, 1.0], [1.0, 1.0]),
    parts([None, None], [0.0, 0.0], [0.0, 1.0]),
]


def controlled(rounds=ROUNDS, attempts=1):
    return ControlledRewards(
        Given(rounds), WeightController(tuple(CAPABILITIES)), CAPABILITIES, WEIGHTS, attempts=attempts
    )


def score(rewards, number):
    return rewards(number, [], [], [], {}).rewards


def test_the_first_rollout_has_the_weights_of_the_config():
    assert score(controlled(), 0) == [2.0 + 0.0 + 1.0, 0.0 + 1.0 + 1.0]


def test_what_a_rollout_gave_moves_the_weights_of_the_next():
    rewards = controlled()
    score(rewards, 0)
    found = score(rewards, 1)
    # Rescaled: accuracy (1 + 0) / 2; reasoning the mean of ((0 + 1) / 2 + 1) / 2 and (1 + 1) / 2.
    expected = WeightController(tuple(CAPABILITIES)).update(
        {"accuracy": 0.5, "reasoning": 0.875}, WeightController(tuple(CAPABILITIES)).init()
    )
    accuracy, reasoning = expected["weights"].values()
    assert accuracy > 1 > reasoning
    assert rewards.multipliers() == {"key": accuracy, "steps": reasoning, "form": reasoning}
    assert found == pytest.approx([reasoning * 1.0, reasoning * 0.5])


def test_the_rounds_of_one_batch_are_weighted_alike_and_counted_together():
    rewards = controlled(attempts=2)
    score(rewards, 0), score(rewards, 1)
    assert set(rewards.multipliers().values()) == {1.0}
    assert rewards.numbers()["scaled/accuracy"] == 0.25
    score(rewards, 2)
    assert rewards.numbers()["success/accuracy"] == 0.25
    assert rewards.numbers()["control/accuracy"] > 1


def test_a_completion_that_could_not_be_scored_stays_so_and_a_reward_that_applies_to_nobody_moves_nothing():
    rewards = controlled([parts([None], [None], [None]), ROUNDS[0], ROUNDS[3]])
    assert score(rewards, 0) == [None]
    score(rewards, 1), score(rewards, 2)
    numbers = rewards.numbers()
    assert (numbers["scaled/accuracy"], numbers["weighted/accuracy"]) == (None, None)


def test_a_kill_between_rounds_changes_nothing():
    whole, killed = controlled(), controlled()
    for number in range(2):
        score(whole, number), score(killed, number)
    state = json.loads(json.dumps(killed.get_state()))
    score(killed, 2)  # lost
    again = controlled()
    again.set_state(state)
    for number in (2, 3):
        assert score(again, number) == score(whole, number)
        assert again.numbers() == whole.numbers()


def test_scaling_leaves_out_what_does_not_apply():
    found = Capability({"a": (0.0, 2.0), "b": (0.0, 1.0)}).scaled({"a": [1.0, None, None], "b": [1.0, 0.25, None]})
    assert np.array_equal(found, [0.75, 0.25, np.nan], equal_nan=True)


def grpo(control):
    return {
        "run": "run",
        "stages": {
            "base": {"kind": "model", "path": "x"},
            "grpo": {
                "kind": "grpo", "from": "base", "data": {"path": "prompts.jsonl"}, "steps": 1, "prompts": 1,
                "rollout": {"rows": 1, "group": 2, "completion": 8}, "optimiser": {"learning_rate": 1e-5},
                "shapes": {"rows": 1}, "control": control,
                "rewards": {
                    "key": {"kind": "choice", "options": {"letters": "AB"}}, "form": {"kind": "format"},
                    "logged": {"kind": "format", "weight": 0.0},
                },
            },
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("control", "message"),
    [
        ({"capabilities": {"a": ["key"], "b": ["from"]}}, "control.capabilities names 'from', but the rewards are key, form, logged"),
        ({"capabilities": {"a": ["key"], "b": ["logged"]}}, "reward 'logged' has weight 0"),
        ({"capabilities": {"a": ["key"], "b": ["form", "key"]}}, "reward 'key' stands twice"),
        ({"capabilities": {"a": ["key"], "b": []}}, "control.capabilities.b: no reward stands for it"),
        ({"capabilities": {"a": ["key", "form"]}}, "at least two capabilities"),
        ({"ranges": {"logged": [0.0, 1.0]}}, "control.ranges names 'logged', which is in no capability"),
        ({"ranges": {"key": [1.0, 1.0]}}, "control.ranges.key: expected two numbers that ascend"),
        ({"low": 2.0}, "must hold 1 between them"),
        ({"form": "pid"}, "form must be one of position, printed"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_any_work(tmp_path, control, message):
    (tmp_path / "study.yaml").write_text(write_yaml(grpo(control)))
    with pytest.raises(ConfigError, match=message):
        load_config(StudyConfig, tmp_path / "study.yaml")


def test_each_weighted_reward_is_a_capability_where_none_are_named(tmp_path):
    (tmp_path / "study.yaml").write_text(write_yaml(grpo({"ranges": {"key": [-1.0, 1.0]}})))
    stage = load_config(StudyConfig, tmp_path / "study.yaml").stages["grpo"]
    assert stage.control == Control(ranges={"key": (-1.0, 1.0)})
    found = stage.control.grouped([name for name, weight in stage.reward_weights.items() if weight])
    assert {name: dict(each.ranges) for name, each in found.items()} == {
        "key": {"key": (-1.0, 1.0)},
        "form": {"form": (0.0, 1.0)},
    }
