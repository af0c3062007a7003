"""Decode shapes and packing: few programs, room for everything, no completion lost, groups stay together."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_checkpoints import text

from vlmalign.rollout.compaction import (
    MOST_PROGRAMS,
    SHORTEST,
    decode_shapes,
    fitting,
    length_classes,
    packed,
    prompt_lengths,
)
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.engine import block_length
from vlmalign.rollout.sampling import Sampling


@settings(deadline=None)
@given(
    rows=st.integers(1, 40),
    group=st.integers(1, 16),
    completion=st.integers(1, 20_000),
    smaller=st.integers(0, MOST_PROGRAMS - 1),
)
def test_shapes_are_few_and_the_first_ones_hold_everything(rows, group, completion, smaller):
    steps = block_length(completion)
    shapes = decode_shapes(rows=rows, group=group, completion=completion, steps=steps, smaller=smaller)
    assert len(set(shapes)) == len(shapes) <= MOST_PROGRAMS
    assert all(shape.length % steps == 0 for shape in shapes)
    room = max(shape.length for shape in shapes)
    assert completion <= room < completion + steps * MOST_PROGRAMS
    whole = [shape for shape in shapes if shape[:2] == (rows, group)]
    assert room == whole[-1].length
    assert all(1 <= b.length / a.length <= 2 for a, b in pairwise(whole))
    for before, after in zip(shapes[len(whole) - 1 :], shapes[len(whole) :], strict=False):
        assert after.length == room
        assert after.rows * after.group < before.rows * before.group
        assert after.rows <= before.rows
        assert after.group <= before.group


def test_short_completions_have_one_shape():
    assert len(decode_shapes(rows=8, group=4, completion=SHORTEST, steps=16, smaller=3)) == 1


def test_on_a_mesh_rows_divide_over_the_devices():
    shapes = decode_shapes(rows=12, group=2, completion=300, steps=16, smaller=4, shares=4)
    assert {shape.rows for shape in shapes} == {12}
    shapes = decode_shapes(rows=16, group=1, completion=300, steps=16, smaller=4, shares=4)
    assert {shape.rows for shape in shapes} == {16, 8, 4}


def test_the_smallest_shape_that_fits_is_taken():
    shapes = decode_shapes(rows=8, group=4, completion=500, steps=16, smaller=2)
    assert fitting(shapes, rows=8, group=4, length=64) == (8, 4, 64)
    assert fitting(shapes, rows=8, group=4, length=65) == (8, 4, 128)
    assert fitting(shapes, rows=5, group=1, length=10) == (8, 4, 64)
    assert fitting(shapes, rows=4, group=3, length=10) == (4, 4, 512)
    assert fitting(shapes, rows=1, group=2, length=500) == (4, 2, 512)


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=9))
def test_packing_keeps_every_live_completion_in_its_row(rows):
    live = np.array(rows, bool)
    n, k = max(1, int(live.any(axis=1).sum())), max(1, int(live.sum(axis=1).max()))
    row, column = packed(live, rows=n, group=k)
    assert row.shape == (n,)
    assert column.shape == (n, k)
    kept = {(int(r), int(c)) for r, own in zip(row, column, strict=True) for c in own}
    assert len(kept) == n * k
    assert {(int(r), int(c)) for r, c in np.argwhere(live)} <= kept


def test_a_number_of_smaller_shapes_that_leaves_no_length():
    with pytest.raises(ValueError, match=r"smaller must lie in 0 .. 7, found 8"):
        decode_shapes(rows=8, group=4, completion=500, steps=16, smaller=8)


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 500), max_size=40), rows=st.integers(1, 8), multiple=st.sampled_from([1, 8, 32]))
def test_length_classes_hold_every_prompt_once(lengths, rows, multiple):
    classes = length_classes(lengths, rows=rows, multiple=multiple)
    assert sorted(i for _, members in classes for i in members) == list(range(len(lengths)))
    for wide, members in classes:
        longest = max(lengths[i] for i in members)
        assert longest <= wide < longest + multiple
    assert all(len(members) >= rows for _, members in classes[:-1])
    assert len(classes) <= 10, "500 halves nine times"


def test_declared_lengths():
    assert length_classes([30, 10, 12, 31], rows=1, multiple=8, allowed=(16, 40)) == [(40, [0, 3]), (16, [1, 2])]
    with pytest.raises(ValueError, match="prompt 1 of this rollout has 41 tokens"):
        length_classes([30, 41], rows=1, multiple=8, allowed=(16, 40))


@pytest.mark.parametrize("completion", [16, 70, 150, 768, 2048, 16384])
@pytest.mark.parametrize("lengths", [(), (64,), (64, 256), (64, 128, 256), tuple(range(64, 513, 64))], ids=len)
def test_a_generator_has_at_most_eight_decode_programs(completion, lengths):
    made = Generator(text().model, None, (1,), 8, 4, completion, Sampling(), prompt_lengths=lengths)
    assert max(1, len(lengths)) * len(made.shapes) <= MOST_PROGRAMS == 8
    assert made.shapes[0][:2] == (8, 4)
    assert any(s[:2] == (8, 4) and s.length >= completion for s in made.shapes), "there is room for the longest"


def test_a_second_length_is_taken_where_it_saves():
    assert prompt_lengths([100] * 9 + [120], multiple=32) == (128,)
    assert prompt_lengths([500] + [40] * 9, multiple=32) == (64, 512)
    assert prompt_lengths([500] * 9 + [40], multiple=32) == (512,)
    assert prompt_lengths([], multiple=32) == ()
    with pytest.raises(ValueError, match="prompt_lengths: at most 8"):
        Generator(text().model, None, (1,), 8, 4, 16, Sampling(), prompt_lengths=tuple(range(8, 80, 8)))
