"""Labels that rewards are not shown: one truth for a group, another one at the next round, and never an empty one."""

from __future__ import annotations

from vlmalign.rewards.runner import ScoredBatch
from vlmalign.training.label_dropout import kept_labels, with_label_dropout

LABELS = ["Edema", "Fracture", "Pneumonia"]


def shown(number: int, prompts: list[int], truth: list, *, share: float = 0.5, seed: int = 0) -> list:
    """The truth that the reward gets for two completions of every prompt."""
    seen = {}

    def score(number, keys, prompts, completions, columns):
        seen.update(columns)
        return ScoredBatch([0.0] * len(keys), {}, ())

    keys = [(prompt, sample) for prompt in prompts for sample in range(2)]
    twice = [labels for labels in truth for _ in range(2)]
    columns = {"truth": twice, "view": ["AP"] * len(keys)}
    with_label_dropout(score, share, seed=seed)(number, keys, [""] * len(keys), [""] * len(keys), columns)
    assert columns["truth"] == twice, "what it was given is left as it was"
    assert seen["view"] == ["AP"] * len(keys)
    return seen["truth"]


def test_a_group_is_compared_under_one_truth_and_the_next_round_draws_anew():
    prompts = list(range(40))
    one, again, later, other = (
        shown(number, prompts, [LABELS] * 40, seed=seed) for number, seed in ((3, 0), (3, 0), (4, 0), (3, 1))
    )
    assert one[::2] == one[1::2]
    assert one == again
    assert one != later
    assert one != other
    assert shown(3, prompts[5:6], [LABELS]) == one[10:12], "whatever other prompts the round has"


def test_each_label_is_dropped_by_itself_in_its_share():
    n, share = 4000, 0.2
    found = [kept_labels(LABELS, share, key=(0, number, 7)) for number in range(n)]
    for label in LABELS:
        dropped = sum(label not in labels for labels in found) / n
        expected = share - share**3  # nothing is dropped where all would be
        assert abs(dropped - expected) < 4 * (expected * (1 - expected) / n) ** 0.5
    assert all(labels == [label for label in LABELS if label in labels] for labels in found)


def test_a_truth_is_never_emptied_and_none_is_made_up():
    assert all(shown(number, [1], [["Edema"]], share=0.99) == [["Edema"]] * 2 for number in range(20))
    assert shown(0, [1, 2], [None, []]) == [None, None, [], []]
