"""A collapse penalty that a whole group pays leaves every advantage, so the gradient, as it is; one that only those pay
who name the dominant label lowers theirs."""

import numpy as np
import pytest

from vlmalign.objectives.advantages import SCALES, combined_advantages, group_advantages, leave_one_out_advantages
from vlmalign.rewards.chexreason import chexreason_nuanced
from vlmalign.rewards.runner import RewardRunner

LABELS = ("Fracture", "Edema", "Pneumonia", "No Finding")
GROUPS = [  # each: the truth, and what four completions say
    (["Edema"], ["No Finding", "Edema", "Edema, Fracture", "No Finding, Edema"]),
    (["No Finding"], ["No Finding", "No Finding", "Fracture", "Pneumonia"]),
    (["Fracture"], ["Fracture", "Pneumonia", "Edema", "Fracture"]),
]
NAMED = np.array([["No Finding" in each for each in solutions] for _, solutions in GROUPS])

ADVANTAGES = {
    **{f"group, {scale}": lambda r, scale=scale: group_advantages(r, scale=scale) for scale in SCALES},
    "leave one out": leave_one_out_advantages,
    "leave one out, normalised": lambda r: leave_one_out_advantages(r, normalise=True),
}


def scored(everyone: bool) -> dict[str, np.ndarray]:
    """[groups, 4] by part, judged by 100 predictions before them, of which 80 say No Finding: -50 - 30 x 10."""
    completions = [f"<think>x</think><solution>{each}</solution>" for _, group in GROUPS for each in group]
    truth = [true for true, group in GROUPS for _ in group]
    with RewardRunner(
        chexreason_nuanced(LABELS, frequency=(0.1, 0.3, 0.2, 0.4), everyone=everyone), workers=0
    ) as runner:
        runner.set_state({"collapse": {"window": [["No Finding"]] * 80 + [["Edema"]] * 20}})
        parts = runner.score([""] * len(truth), completions, {"truth": truth}).parts
    return {name: np.reshape(np.asarray(values, float), (len(GROUPS), 4)) for name, values in parts.items()}


def test_who_pays():
    assert (scored(everyone=True)["collapse"] == -350).all()
    assert (scored(everyone=False)["collapse"] == np.where(NAMED, -350, 0)).all()


@pytest.mark.parametrize("name", ADVANTAGES)
def test_the_price_that_all_pay_has_no_gradient_and_the_own_one_has(name):
    advantage = ADVANTAGES[name]
    printed, own = scored(everyone=True), scored(everyone=False)
    without = advantage(printed["nuanced"]).value
    assert np.abs(without).max() > 0.1
    np.testing.assert_allclose(advantage(printed["nuanced"] + printed["collapse"]).value, without, rtol=1e-6, atol=1e-6)
    assert (advantage(printed["collapse"]).value == 0).all()

    changed = advantage(own["nuanced"] + own["collapse"]).value
    mixed = NAMED.any(axis=1) & ~NAMED.all(axis=1)  # groups in which some name it and some do not
    assert mixed.tolist() == [True, True, False]
    lowered = (changed - without)[mixed]
    means = [(group[named].mean(), group[~named].mean()) for group, named in zip(lowered, NAMED[mixed], strict=True)]
    assert all(named < 0 < others for named, others in means)


def test_the_same_holds_when_rewards_are_normalised_apart():
    """GDPO: z-scores of each reward, summed."""
    found = {}
    for everyone in (True, False):
        parts = scored(everyone)
        both = np.stack([parts["nuanced"], parts["collapse"]], axis=-1)
        found[everyone] = combined_advantages(both, aggregation="normalise_then_sum").value
    alone = combined_advantages(scored(True)["nuanced"][..., None], aggregation="normalise_then_sum").value
    np.testing.assert_allclose(found[True], alone, rtol=1e-6, atol=1e-6)
    assert np.abs(found[False] - alone).max() > 0.1
