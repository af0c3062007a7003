"""Groups become rectangles: every column by hand, and clear errors for what does not fit."""

import numpy as np
import pytest

from vlmalign.data.groups import collate, layout_of, round_up
from vlmalign.types import Grid, Group, Layout, Segment

GRIDS = {"a": Grid(1, 2), "b": Grid(1, 3)}


def segment(tokens, image=None, weight=1.0) -> Segment:
    n = len(tokens)
    return Segment(
        np.array(tokens, np.int32),
        np.full(n, -1, np.int32) if image is None else np.array(image, np.int32),
        np.full(n, weight, np.float32),
    )


def put(groups, layout, rows=None):
    return collate(groups, layout, rows=rows or len(groups), grid=GRIDS.__getitem__)


def test_a_batch_by_hand():
    groups = [
        Group(
            7,
            segment([2, 9, 9], [-1, 0, 0], 0.0),
            (segment([11, 12]), segment([13, 9, 9, 9], [-1, 1, 1, 1])),
            ("a", "b"),
        ),
        Group(8, segment([5, 9, 9, 9], [-1, 0, 0, 0], 0.0), (segment([14]), segment([15, 16])), ("b",)),
    ]
    batch, keys = put(groups, Layout(4, 2, 4), rows=3)
    assert keys == ["a", "b"]  # a holds rows 0 and 1 of the features, b rows 2 to 4
    assert batch.tokens.tolist() == [
        [2, 9, 9, 0, 11, 12, 0, 0, 13, 9, 9, 9],
        [5, 9, 9, 9, 14, 0, 0, 0, 15, 16, 0, 0],
        [0] * 12,
    ]
    assert batch.segment.tolist() == [
        [0, 0, 0, -1, 1, 1, -1, -1, 2, 2, 2, 2],
        [0, 0, 0, 0, 1, -1, -1, -1, 2, 2, -1, -1],
        [-1] * 12,
    ]
    assert batch.order.tolist() == [
        [0, 1, 2, 0, 3, 4, 0, 0, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 0, 0, 0, 4, 5, 0, 0],
        [0] * 12,
    ]
    assert batch.position.tolist() == batch.order.tolist()
    assert batch.image.tolist() == [
        [-1, 0, 1, -1, -1, -1, -1, -1, -1, 2, 3, 4],
        [-1, 2, 3, 4, -1, -1, -1, -1, -1, -1, -1, -1],
        [-1] * 12,
    ]
    assert batch.block.tolist() == [
        [-1, 0, 0, -1, -1, -1, -1, -1, -1, 1, 1, 1],
        [-1, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1],
        [-1] * 12,
    ]
    assert batch.weight.tolist() == [[[1, 1, 0, 0], [1, 1, 1, 1]], [[1, 0, 0, 0], [1, 1, 0, 0]], [[0] * 4] * 2]
    assert batch.group_id.tolist() == [7, 8, -1]
    assert batch.layout == Layout(4, 2, 4)


def test_one_image_twice_on_end_is_two_blocks_with_the_same_features():
    batch, keys = put([Group(0, segment([9] * 4, [0] * 4), (), ("a",))], Layout(4, 0, 0))
    assert keys == ["a"]
    assert batch.image.tolist() == [[0, 1, 0, 1]]
    assert batch.block.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize(
    ("lengths", "multiple", "expected"),
    [
        ([(3, [5, 8]), (9, [1, 2])], 8, Layout(16, 2, 8)),
        ([(8, [9])], 8, Layout(8, 1, 16)),
        ([(1, [])], 8, Layout(8, 0, 0)),
    ],
)
def test_the_smallest_layout(lengths, multiple, expected):
    groups = [Group(i, segment([1] * p), tuple(segment([1] * c) for c in cs), ()) for i, (p, cs) in enumerate(lengths)]
    assert layout_of(groups, prompt_multiple=multiple, completion_multiple=multiple) == expected


def test_groups_of_different_size_have_no_layout():
    groups = [Group(i, segment([1]), (segment([1]),) * (i + 1), ()) for i in range(2)]
    with pytest.raises(ValueError, match=r"same number of continuations, found \[1, 2\]"):
        layout_of(groups, prompt_multiple=8, completion_multiple=8)


def test_rounding():
    assert [round_up(n, 8) for n in (0, 1, 8, 9)] == [8, 8, 8, 16]


ONE = (segment([1]),)


@pytest.mark.parametrize(
    ("group", "said"),
    [
        (Group(42, segment([1] * 5), ONE, ()), "group 42: prompt of 5 and continuation of 1"),
        (Group(42, segment([1]), (segment([1] * 5),), ()), "group 42: prompt of 1 and continuation of 5"),
        (Group(42, segment([1]), ONE * 2, ()), "group 42 has 2 continuations, the layout 1"),
        (Group(42, segment([1]), (), ()), "group 42 has 0 continuations, the layout 1"),
        (Group(42, segment([]), ONE, ()), "group 42: the prompt is empty"),
        (Group(42, segment([9], [0]), ONE, ("a",)), "group 42: image a needs 2 soft tokens"),
        (Group(42, segment([9, 1, 9], [0, -1, 0]), ONE, ("a",)), "group 42: image a needs 2 soft tokens"),
        (Group(42, segment([9, 9, 9], [0, 0, 0]), ONE, ("a",)), "group 42: image a needs 2 soft tokens"),
        (Group(42, segment([9, 9], [0, 1]), ONE, ("a", "b")), "group 42: image a needs 2 soft tokens"),
        # The prompt ends inside an image.
        (Group(42, segment([9], [0]), (segment([9], [0]),), ("a",)), "group 42: image a needs 2"),
    ],
    ids=["prompt", "completion", "many", "none", "empty", "short", "torn", "long", "mixed", "across"],
)
def test_what_does_not_fit_is_named(group, said):
    with pytest.raises(ValueError, match=said):
        put([group], Layout(4, 1, 4))


def test_more_groups_than_rows():
    with pytest.raises(ValueError, match="2 groups do not fit 1 rows"):
        put([Group(0, segment([1]), ONE, ())] * 2, Layout(4, 1, 4), rows=1)


def test_an_image_where_images_have_no_soft_tokens():
    """A model without a tower: not an endless search for the end of a run of none."""
    group = Group(42, segment([9, 9], [0, 0]), ONE, ("a",))
    with pytest.raises(ValueError, match="group 42: image a stands in the text"):
        collate([group], Layout(4, 1, 4), rows=1, grid=None)
