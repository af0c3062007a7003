"""Features are encoded once per distinct image; prompts come back in order whatever the batches."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_checkpoints import SOFT_TOKENS, adapted, assert_close, group, picture, pictures, put, vlm

from vlmalign.rollout.completions import Generator
from vlmalign.rollout.features import FeatureStore
from vlmalign.rollout.sampling import Sampling
from vlmalign.rollout.slots import Ending, Slots
from vlmalign.types import Grid, Layout

PROMPTS = [
    group(70, list(range(3, 19))),
    group(71, [2, 40, "a", 41, 42, 43]),
    group(72, [2, "b", "c", 44]),
    group(73, [2, "c", "a", 45]),
]


class Reader:
    """Counts what is read."""

    def __init__(self):
        self.seen: list[str] = []

    def grid(self, key):
        return Grid(1, SOFT_TOKENS)

    def read(self, keys):
        self.seen += keys
        return list(pictures(keys))


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def store(reader) -> FeatureStore:
    return FeatureStore(vlm().model, vlm().params, reader, chunk=2)


def generator(store: FeatureStore | None, **changes) -> Generator:
    fields = {
        "model": vlm().model,
        "features": store,
        "stop_ids": (1,),
        "rows": 3,
        "group": 3,
        "completion": 5,
        "sampling": Sampling(temperature=0.7),
        "multiple": 16,
        "images": 2,
    }
    return Generator(**{**fields, **changes})


def test_each_distinct_image_is_encoded_once(store, reader):
    first = store.features(["a", "b", "a", "c"])
    assert [f.shape for f in first] == [(SOFT_TOKENS, 32)] * 4
    assert np.array_equal(first[0], first[2])
    again = store.features(["c", "b"])
    assert np.array_equal(again, [first[3], first[1]])
    assert store.encoded == 3
    assert reader.seen == ["a", "b", "c"]


def test_features_are_the_towers(store):
    for key, found in zip("ab", store.features(["a", "b"]), strict=True):
        assert_close(found, jax.jit(vlm().model.encode)(vlm().params, picture(key)[None]), 1e-5)


def test_the_last_call_of_a_chunk_is_padded_not_recompiled(store):
    for keys in (["a"], ["b", "c", "d"], ["e", "f"]):
        store.features(keys)
    assert store.encoded == 6
    assert store._program._cache_size() == 1


def test_the_least_recently_used_goes_first(reader):
    store = FeatureStore(vlm().model, vlm().params, reader, capacity_bytes=2 * SOFT_TOKENS * 32 * 4, chunk=2)
    store.features(["a", "b"])
    store.features(["a"])
    store.features(["c"])  # b goes
    store.features(["a"])
    assert reader.seen == ["a", "b", "c"]
    store.features(["b"])
    assert reader.seen == ["a", "b", "c", "b"]
    assert len(store.features(["d", "e", "f"])) == 3, "one call may need more than is held"


def test_a_model_with_an_adapter_can_be_given(reader):
    """The tower carries none."""
    store = FeatureStore(adapted().model, vlm().params, reader, chunk=2)
    plain = FeatureStore(vlm().model, vlm().params, reader, chunk=2)
    assert_close(store.features(["a"]), plain.features(["a"]), 0)


def test_attach_gives_every_place_its_features(store):
    batch = put(PROMPTS[1:], Layout(16, 0, 0))._replace(pixels=None)
    attached = store.attach(batch, ["a", "b", "c"], images=4)
    assert attached.features.shape == (4 * SOFT_TOKENS, 32)
    assert not attached.features[3 * SOFT_TOKENS :].any()
    rows = attached.features[attached.image[1][attached.image[1] >= 0]]
    assert np.array_equal(rows, np.concatenate(store.features(["b", "c"])))
    with pytest.raises(ValueError, match="3 distinct images does not fit 2"):
        store.attach(batch, ["a", "b", "c"], images=2)


def test_completions_come_back_in_order(store, reader):
    done: list[int] = []
    found = generator(store).run(vlm().params, PROMPTS, jax.random.key(0), advance=done.append)
    assert sum(done) == 4
    assert min(done) > 0
    assert [len(answers) for answers in found] == [3] * 4
    assert reader.seen == ["a", "b", "c"]
    assert store.encoded == 3
    turned = generator(store).run(vlm().params, PROMPTS[::-1], jax.random.key(0))[::-1]
    for one, two in zip(found, turned, strict=True):
        for a, b in zip(one, two, strict=True):
            assert np.array_equal(a.tokens, b.tokens)
            assert np.array_equal(a.logp, b.logp)
            assert a.stopped == b.stopped == (a.tokens[-1] == 1)
            assert len(a.tokens) == len(a.logp) <= 5
    assert store.encoded == 3, "a second pass encodes nothing"


def test_images_without_a_store_are_an_error():
    with pytest.raises(ValueError, match="group 71: image a"):
        generator(None).run(vlm().params, PROMPTS[1:2], jax.random.key(0))


def test_more_images_than_the_batch_has_room_for(store):
    few = [replace(PROMPTS[2], id=1), PROMPTS[1], group(9, [2, "d", "e", 5])]
    with pytest.raises(ValueError, match="5 distinct images does not fit 3"):
        generator(store, images=1, prefill_rows=3).run(vlm().params, few, jax.random.key(0))


def test_every_block_is_watched():
    """Of two completions one ends in the first block; each is shown as far as it has come, and no free row is."""
    slots, seen = Slots(2, 2, Ending(longest=6, stop_ids=(1,))), []
    slots.put(1, 7, group_id=70, length=3, next_position=3)
    zeros = np.zeros((2, 2, 4), np.float32)
    for block in ([[9, 9, 9, 9], [5, 1, 9, 9]], [[8, 8, 8, 8], [9, 9, 9, 9]]):
        tokens = np.array([[[9] * 4] * 2, block], np.int32)
        done = slots.add((tokens, zeros, zeros), lambda *found: seen.append((*found[:2], found[2].tolist())))
    assert seen == [(7, 0, [9, 9, 9, 9]), (7, 1, [5, 1]), (7, 0, [9, 9, 9, 9, 8, 8])]
    assert [completion.tokens.tolist() for completion in done[7]] == [seen[2][2], seen[1][2]]


def test_one_program_has_room_for_the_longest_completion(store):
    grown, whole = generator(store, completion=150), generator(store, completion=150, programs=1)
    assert len(grown.shapes) > 1
    assert whole.shapes == (grown.shapes[0]._replace(length=150),)
    with pytest.raises(ValueError, match="prompt_lengths: at most 1"):
        generator(store, programs=1, prompt_lengths=(16, 32))
