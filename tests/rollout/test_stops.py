"""What ends a completion: stop tokens, the length limit, stop strings in the text; and the choice of the best."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmalign.rollout.merge_check import logp_gap
from vlmalign.rollout.n_best import n_best
from vlmalign.rollout.slots import Completion, Ending, Slots
from vlmalign.rollout.stop_strings import first_stop

#: tokens that are pieces of text, some of several characters
PIECES = ["a", "b", "ab", "\n", "\n\n", "Que", "stion", ":", "<end>"]


def text(tokens) -> str:
    return "".join(PIECES[i] for i in tokens)


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, len(PIECES) - 1), max_size=12),
    stop=st.lists(st.sampled_from(["ab", "\n\n", "Question:", "ba", "n:a"]), min_size=1, max_size=3),
    known=st.integers(0, 12),
)
def test_the_first_stop_string_is_found_wherever_it_is_cut(tokens, stop, known):
    array = np.array(tokens, np.int32)
    by_hand = [n for n in range(1, len(tokens) + 1) if any(s in text(tokens[:n]) for s in stop)]
    expected = by_hand[0] if by_hand else None
    assert first_stop(array, stop, text) == expected
    before = min(known, (expected or len(tokens) + 1) - 1)
    assert first_stop(array, stop, text, known=before) == expected


@pytest.mark.parametrize(
    ("tokens", "known", "expected"),
    [
        ([0, 1, 8, 0], 0, (3, True)),  # the stop token stays, what follows goes
        ([0, 1, 0], 0, None),
        ([0, 0, 3, 4, 8, 0], 2, (4, True)),  # a stop string before the stop token
        ([0, 8, 3, 3], 0, (2, True)),  # and after it
        ([0] * 6, 4, (6, False)),
        ([0] * 7, 4, (6, False)),  # the last block may overhang the limit
        ([0] * 6 + [8], 4, (6, False)),
        ([0] * 5 + [8], 4, (6, True)),
        ([0] * 5 + [3, 3], 4, (6, False)),
    ],
)
def test_what_ends_a_completion(tokens, known, expected):
    slots = Slots(1, 1, Ending(6, (8,), ("\n\n",), text))
    slots.put(0, 7, group_id=0, length=3, next_position=3)
    blocks = [np.array(part, np.int32) for part in (tokens[:known], tokens[known:]) if part]
    *before, last = [slots.add([block[None, None], *[block[None, None] / 8.0] * 2]) for block in blocks]
    assert before in ([], [{}])
    assert slots.live[0, 0] == (expected is None)
    if expected is None:
        assert last == {}
        return
    (done,) = last[7]
    assert (len(done.tokens), done.stopped) == expected
    assert done.tokens.tolist() == tokens[: len(done.tokens)]
    assert np.array_equal(done.logp * 8, done.tokens)
    assert len(slots.free) == 1


def completion(*tokens: int, logp: float) -> Completion:
    values = np.full(len(tokens), logp / len(tokens), np.float32)
    return Completion(np.array(tokens, np.int32), values, values, True)


def test_n_best_are_the_most_likely_different_ones():
    short, long, same = completion(1, 2, logp=-3.0), completion(3, 4, 5, 6, logp=-4.0), completion(1, 2, logp=-3.0)
    worst = completion(7, logp=-9.0)
    assert n_best([worst, long, short, same], 3) == [short, long, worst]
    assert n_best([worst, long, short, same], 1, per_token=True) == [long]
    with pytest.raises(ValueError, match="count must be >= 1"):
        n_best([short], 0)


def test_logp_gap_counts_real_tokens_of_all_batches():
    a, b = np.zeros((1, 1, 3), np.float32), np.array([[[0.5, -0.1, 9.0]]], np.float32)
    real = np.array([[[True, True, False]]])
    found = logp_gap([a, a], [b, -b], [real, real])
    assert found.tokens == 4
    assert found.largest == 0.5
    assert np.isclose(found.mean, 0.3)
    with pytest.raises(ValueError, match="no tokens"):
        logp_gap([a], [b], [~np.ones_like(real)])
