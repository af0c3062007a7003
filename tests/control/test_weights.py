"""The controller of capability weights: steady states, limits, step responses, and what the printed form does."""

import json
import math

import numpy as np
import pytest

from vlmalign.control.weights import WeightController

NAMES = ("accuracy", "reasoning", "form")
RATES = {"accuracy": 0.3, "reasoning": 0.5, "form": 0.9}


def run(controller, rewards, state=None):
    state = controller.init() if state is None else state
    for each in rewards:
        state = controller.update(each, state)
    return state


def test_the_first_update_by_hand():
    found = run(WeightController(NAMES, kp=2.0, ki=0.5, kd=1.0), [RATES])
    mean = 1.7 / 3
    for name, rate in RATES.items():
        error = mean - rate
        assert found["weights"][name] == pytest.approx(math.exp((2.0 + 0.5 + 1.0) * error))
        assert found["success"][name] == rate


def test_success_rates_are_moving_means_and_what_has_no_reward_keeps_its_own():
    controller = WeightController(NAMES, decay=0.75)
    found = run(controller, [RATES, {"accuracy": 0.7, "form": None}])
    assert found["success"] == {"accuracy": pytest.approx(0.75 * 0.3 + 0.25 * 0.7), "reasoning": 0.5, "form": 0.9}


def test_what_was_never_rewarded_takes_no_part():
    found = run(WeightController(NAMES, ki=0.0), [{"accuracy": 0.2, "form": 0.6}])
    assert found["weights"]["reasoning"] == 1.0
    assert found["weights"]["accuracy"] == pytest.approx(math.exp(0.2))


def test_the_product_of_the_weights_is_1_while_none_is_clamped():
    rng = np.random.default_rng(0)
    controller = WeightController(NAMES, kp=0.7, ki=0.03, kd=0.2, low=1e-3, high=1e3)
    state = controller.init()
    for _ in range(200):
        state = controller.update({name: rng.random() for name in NAMES if rng.random() < 0.8}, state)
        assert math.prod(state["weights"].values()) == pytest.approx(1.0)
    assert sum(state["clamped"].values()) == 0


def test_weights_stay_between_their_limits_and_come_back_at_once():
    """A success that turns after a long time at the limit: with a wound-up integral the weight would stay there."""
    controller = WeightController(("a", "b"), kp=0.5, ki=0.1, decay=0.0, low=0.5, high=2.0)
    state = run(controller, [{"a": 0.0, "b": 1.0}] * 300)
    assert state["weights"] == {"a": 2.0, "b": 0.5}
    assert state["clamped"]["a"] > 250
    assert abs(sum(state["integral"].values())) < 1e-9
    turned = run(controller, [{"a": 1.0, "b": 0.0}] * 12, state)
    assert turned["weights"]["a"] < 1 < turned["weights"]["b"]


def test_the_product_is_1_again_after_a_limit_was_left():
    controller = WeightController(NAMES, kp=0.5, ki=0.2, decay=0.0, low=0.5, high=2.0)
    state = run(controller, [RATES] * 50)
    assert max(state["weights"].values()) == 2.0
    state = run(controller, [{"accuracy": 0.6, "reasoning": 0.5, "form": 0.4}] * 20, state)
    inside = [0.5 < weight < 2.0 for weight in state["weights"].values()]
    assert all(inside), state["weights"]
    assert math.prod(state["weights"].values()) == pytest.approx(1.0)


def test_a_step_is_answered_by_proportion_first_and_integral_later():
    """Errors that stand still: the weight jumps by kp and then grows by ki an update."""
    controller = WeightController(("a", "b"), kp=1.0, ki=0.1, decay=0.0, low=0.01, high=100.0)
    drives = []
    state = controller.init()
    for _ in range(5):
        state = controller.update({"a": 0.4, "b": 0.6}, state)
        drives.append(math.log(state["weights"]["a"]))
    assert drives == pytest.approx([0.1 + 0.01 * n for n in range(1, 6)])


def test_the_printed_form_grows_without_end():
    controller = WeightController(NAMES, kp=0.05, ki=0.01, decay=0.0, form="printed")
    found = run(controller, [RATES] * 200)
    assert 1e24 < found["weights"]["accuracy"] < 1e25
    with pytest.raises(ValueError, match=r"'accuracy' is no longer a number after \d+ updates: the printed form"):
        run(controller, [RATES] * 800)


def test_state_goes_through_json():
    controller = WeightController(NAMES)
    state = run(controller, [RATES, {"accuracy": 0.1}])
    kept = json.loads(json.dumps(state))
    assert controller.update(RATES, kept) == controller.update(RATES, state)
    assert state == json.loads(json.dumps(state))


def test_an_update_does_not_change_the_state_it_is_given():
    controller = WeightController(NAMES)
    state = run(controller, [RATES])
    before = json.dumps(state)
    controller.update(RATES, state)
    assert json.dumps(state) == before


def test_what_a_person_should_know():
    controller = WeightController(("a", "b", "c"), decay=0.0, low=0.9, high=1.1)
    found = controller.notes(run(controller, [{"a": 0.0, "b": 0.5}, {"a": 0.2, "b": 0.5}]))
    assert found == [
        "the weight of capability a stood at a limit after 2 of 2 updates",
        "the reward of capability b was always 0.5: its success rate says nothing",
        "the weight of capability b stood at a limit after 2 of 2 updates",
        "capability c never had a reward; its weight says nothing",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ("a",)}, "at least two capabilities"),
        ({"names": ("a", "a")}, "each named once"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), found 1.0"),
        ({"low": 1.5}, "must hold 1 between them"),
        ({"ki": -0.1}, "ki must be >= 0 and finite, found -0.1"),
        ({"form": "velocity"}, "form must be one of position, printed, found 'velocity'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        WeightController(**{"names": NAMES, **settings})


def test_a_reward_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"'form' must lie in \[0, 1\], found 1.5"):
        run(WeightController(NAMES), [{"form": 1.5}])
