"""Batches: every item once per pass, a new shuffle each pass, and a position that resumes to the very same sequence."""

import json

import pytest

from vlmalign.data.pipeline import shuffled_batches
from vlmalign.distributed import share_of

ITEMS = [f"film {i}" for i in range(12)]


def take(batches, count: int) -> list[list[str]]:
    return [next(batches) for _ in range(count)]


def test_every_item_once_per_pass_in_a_new_order():
    batches = shuffled_batches(ITEMS, batch=4, seed=0)
    passes = [[item for batch in take(batches, 3) for item in batch] for _ in range(4)]
    assert all(sorted(order) == sorted(ITEMS) for order in passes)
    assert len({tuple(order) for order in passes}) == 4
    assert ITEMS not in passes


def test_a_pass_that_batches_do_not_divide_leaves_out_other_items_each_time():
    """Never an item twice in a pass, so never in a batch: groups of one batch are told apart by their prompt."""
    batches = shuffled_batches(ITEMS, batch=5, seed=0)
    left_out = set()
    for _ in range(20):
        seen = [item for batch in take(batches, 2) for item in batch]
        assert len(set(seen)) == 10
        left_out |= set(ITEMS) - set(seen)
    assert left_out == set(ITEMS)


def test_the_seed_is_the_sequence():
    one, same, other = (take(shuffled_batches(ITEMS, batch=4, seed=s), 6) for s in (3, 3, 4))
    assert one == same != other


@pytest.mark.parametrize("at", [0, 1, 3, 7])
def test_a_saved_position_resumes_to_the_same_sequence(at):
    """In a new process: through JSON, into an iterator that has gone elsewhere, across the end of a pass."""
    batches = shuffled_batches(ITEMS, batch=5, seed=1, threads=2)
    take(batches, at)
    state = json.loads(json.dumps(batches.get_state()))
    expected = take(batches, 8)
    again = shuffled_batches(ITEMS, batch=5, seed=1, threads=1)
    take(again, 2)
    again.set_state(state)
    assert take(again, 8) == expected


def test_reading_the_position_does_not_move_it():
    batches = shuffled_batches(ITEMS, batch=5, seed=1)
    plain = take(shuffled_batches(ITEMS, batch=5, seed=1), 4)
    found = []
    for _ in range(4):
        batches.get_state()
        found += take(batches, 1)
    assert found == plain


def test_fewer_items_than_a_batch():
    with pytest.raises(ValueError, match="a batch of 13 needs at least as many examples, found 12"):
        shuffled_batches(ITEMS, batch=13, seed=0)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_take_their_shares_of_the_same_batches(processes):
    """Together they have what one alone has, in order, and each takes no item but its own."""
    taken = [[] for _ in range(processes)]

    class Items(list):
        def __init__(self, process):
            super().__init__(ITEMS)
            self.process = process

        def __getitem__(self, index):
            taken[self.process].append(index)
            return super().__getitem__(index)

    def share(process):
        return lambda items: items[share_of(len(items), process, processes)]

    parts = [shuffled_batches(Items(p), batch=4, seed=3, share=share(p)) for p in range(processes)]
    shares = [take(part, 6) for part in parts]
    whole = [[item for part in batch for item in part] for batch in zip(*shares, strict=True)]
    assert whole == take(shuffled_batches(ITEMS, batch=4, seed=3), 6)
    for own, batches in zip(taken, shares, strict=True):
        wanted = [ITEMS.index(item) for batch in batches for item in batch]
        assert own[: len(wanted)] == wanted, "what comes after was read ahead"
