"""Maps against boxes: cases worked out by hand, and what a map without structure scores."""

import numpy as np
import pytest

from vlmalign.evaluation.localisation import Box, cell_map, centre_map, localise, random_map

LEFT_TOP = Box(0.0, 0.0, 0.5, 0.5)  #: of 4 x 4 cells, four


def peak(row: int, column: int, cells: int = 4) -> np.ndarray:
    values = np.zeros((cells, cells))
    values[row, column] = 1.0
    return values


@pytest.mark.parametrize(
    ("values", "boxes", "top", "hit", "iou"),
    [
        (peak(1, 1), [LEFT_TOP], 1 / 16, 1.0, 1 / 4),  # one cell within the box of four
        (peak(2, 1), [LEFT_TOP], 1 / 16, 0.0, 0.0),
        (peak(0, 0) + peak(0, 3), [LEFT_TOP], 1 / 16, 0.5, 0.5 / 4.5),  # two highest cells, one of them within
        (peak(0, 0) + peak(0, 1) + peak(1, 0) + peak(1, 1), [LEFT_TOP], 4 / 16, 1.0, 1.0),
        (peak(3, 3), [LEFT_TOP, Box(0.75, 0.75, 0.25, 0.25)], 1 / 16, 1.0, 1 / 5),  # either box will do
        (peak(0, 0), [Box(0.0, 0.0, 0.125, 0.25)], 1 / 16, 1.0, 1 / 2),  # half a cell, up to the centre's line
        (peak(0, 0), [Box(0.0, 0.0, 0.12, 0.25)], 1 / 16, 0.0, 0.48),
        (peak(0, 0), [LEFT_TOP, LEFT_TOP], 1 / 16, 1.0, 1 / 4),  # boxes that coincide count once
    ],
)
def test_by_hand(values, boxes, top, hit, iou):
    assert localise(values, boxes, top=top) == (pytest.approx(hit), pytest.approx(iou))


def test_a_map_without_structure_scores_the_mean_of_all_choices():
    box = Box(0.25, 0.25, 0.5, 0.25)  # two cells of sixteen
    found = localise(random_map(4), [box], top=1 / 16)
    choices = [localise(peak(*np.unravel_index(i, (4, 4))), [box], top=1 / 16).hit for i in range(16)]
    assert found.hit == pytest.approx(np.mean(choices))
    assert found.hit == pytest.approx(2 / 16)
    shared = 2 / 16  # of one cell, in the mean
    assert found.iou == pytest.approx(shared / (1 + 2 - shared))


def test_the_centre_is_in_the_centre():
    for cells in (4, 5, 8):
        values = centre_map(cells)
        assert values.shape == (cells, cells)
        assert np.array_equal(values, values[::-1])
        assert np.array_equal(values, values.T)
        assert localise(values, [Box(0.4, 0.4, 0.2, 0.2)], top=0.01).hit == (1.0 if cells != 4 else 0.0)


def test_a_cell_has_the_mean_of_the_patches_over_it():
    drops = np.array([[1.0, 0.0], [0.0, 0.0]])  # 3 x 3 cells, patches of 2 x 2
    assert cell_map(drops, patch=2).tolist() == [[1.0, 0.5, 0.0], [0.5, 0.25, 0.0], [0.0, 0.0, 0.0]]
    assert cell_map(drops, patch=1).tolist() == drops.tolist()
