"""What is said while training goes on: each once, and nothing of a run that goes well."""

from __future__ import annotations

import math

import pytest

from vlmalign.training.guards import Guards

HELD_OUT = "validation/reward"


def told(lines, **settings) -> list[str]:
    said: list[str] = []
    guards = Guards("grpo", said.append, **settings)
    for step, line in enumerate(lines, start=1):
        guards.see({"step": step, **line})
    return said


def test_a_run_that_goes_well_is_told_nothing_of():
    lines = [
        {"reward": 0.2 + i / 100, "kl": 0.02, "entropy": 1.5 - i / 100, "flat_groups": i % 2, "form": i / 40, "labels": i / 50}
        | ({HELD_OUT: 0.2 + i / 200} if i % 5 == 0 else {})
        for i in range(40)
    ]  # fmt: skip
    assert told(lines, held_out=HELD_OUT, rewards=("form", "labels")) == []


def test_nothing_to_compare():
    (said,) = told([{"flat_groups": 1.0}] * 20)
    assert said.startswith("warning, grpo, update 5: in 5 updates in a row all rewards of every group were equal")
    assert told([{"flat_groups": float(i % 5 > 0)} for i in range(40)]) == []


def test_a_gradient_that_is_not_finite_names_its_cases():
    (said,) = told([{"skipped": 0}, {"skipped": 1, "groups": list(range(3, 19))}, {"skipped": 1, "groups": [1]}])
    assert said.startswith("warning, grpo, update 2: the gradient is not finite")
    assert "the cases 3, 4, 5, 6, 7, 8, 9, 10, ... (all of them in metrics.jsonl" in said


def test_kl():
    (said,) = told([{"kl": 0.1}] * 3 + [{"kl": 0.7}] * 20)
    assert said.startswith("warning, grpo, update 8: the KL to the reference is 0.7 nats per token")
    assert told([{"kl": math.nan}, {"kl": None}] * 10) == []


def test_entropy():
    (said,) = told([{"entropy": 2.0}] * 5 + [{"entropy": 0.1}] * 10)
    assert said.startswith("warning, grpo, update 10: the entropy has fallen from 2 to 0.1")


@pytest.mark.parametrize(("lower", "sign"), [(False, 1), (True, -1)])
def test_the_reward_rises_while_the_held_out_number_falls(lower, sign):
    lines = [{"reward": 0.1 * i} | ({HELD_OUT: sign * (1 - 0.1 * i)} if i % 2 == 0 else {}) for i in range(12)]
    (said,) = told(lines, held_out=HELD_OUT, lower=lower)
    assert "update 7: over the last 3 evaluations the reward rose from" in said
    assert f"{HELD_OUT} went from" in said
    assert told(lines, held_out=HELD_OUT, lower=not lower) == []


def test_only_the_form_has_become_better():
    lines = [{"format": i / 20, "labels": 0.3} for i in range(20)]
    (said,) = told(lines, rewards=("format", "labels"))
    assert said.startswith(
        "warning, grpo, update 20: only the form of the answers has become better so far: format +0.75, labels"
    )
    assert told(lines, rewards=("format",)) == [], "form is all that is asked for"
