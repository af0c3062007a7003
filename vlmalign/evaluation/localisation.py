"""Where a map of a film is highest, against boxes drawn by readers: the pointing game and the IoU. numpy only.

A map has cells x cells values over the film. Its top cells are the `top` share of all with the highest values; of equal
values at that bound each counts in part, so that a map without any structure scores what a random choice would, in the mean.

- **Pointing game** (Zhang et al., Top-down Neural Attention by Excitation Backprop, IJCV 2018): 1 where the centre of the
  highest cell lies in a box; of several highest cells their share. No tolerance is added.
- **IoU**: area that the top cells and the boxes share, over the area of both. Boxes of one label on one film count
  together; where they overlap, a cell is covered at most once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Float


class Box(NamedTuple):
    """A rectangle, in shares of the film's width and height: 0 is left and top."""

    left: float
    top: float
    width: float
    height: float


class Localised(NamedTuple):
    """One map against the boxes of its label."""

    hit: float  #: 0..1
    iou: float


def localise(values: Float[np.ndarray, "cell cell"], boxes: Sequence[Box], *, top: float) -> Localised:
    """`values` against at least one box. `top`: share of the cells that the IoU is taken of, at least one cell."""
    cells = len(values)
    covered = np.minimum(sum(_covered(box, cells) for box in boxes), 1.0)
    highest = values == values.max()
    hit = float((highest & _pointed(boxes, cells)).sum() / highest.sum())
    chosen = _top_cells(values, max(1, round(top * cells**2)))
    shared = float((chosen * covered).sum())
    return Localised(hit, shared / (float(chosen.sum() + covered.sum()) - shared))


def centre_map(cells: int) -> Float[np.ndarray, "cell cell"]:
    """Highest in the middle of the film: what a prior without a model would point at."""
    place = (np.arange(cells) + 0.5) / cells - 0.5
    return -np.hypot(place[:, None], place[None, :]).round(12)


def random_map(cells: int) -> Float[np.ndarray, "cell cell"]:
    """Without structure: it scores the mean of all choices."""
    return np.zeros((cells, cells))


def cell_map(drops: Float[np.ndarray, "place place"], *, patch: int) -> Float[np.ndarray, "cell cell"]:
    """From the effect of covering `patch` x `patch` cells at each place, the mean effect of all patches over each cell."""
    cells = len(drops) + patch - 1
    total, count = np.zeros((cells, cells)), np.zeros((cells, cells))
    for row, column in np.ndindex(drops.shape):
        total[row : row + patch, column : column + patch] += drops[row, column]
        count[row : row + patch, column : column + patch] += 1
    return total / count


def _covered(box: Box, cells: int) -> Float[np.ndarray, "cell cell"]:
    """Share of each cell that a box covers."""
    start = np.arange(cells)

    def along(low: float, size: float) -> np.ndarray:
        return np.clip(np.minimum((low + size) * cells, start + 1) - np.maximum(low * cells, start), 0.0, 1.0)

    return along(box.top, box.height)[:, None] * along(box.left, box.width)[None, :]


def _pointed(boxes: Sequence[Box], cells: int) -> np.ndarray:
    """bool [cell, cell]: the cells whose centre lies in a box."""
    place = (np.arange(cells) + 0.5) / cells

    def within(low: float, size: float) -> np.ndarray:
        return (low <= place) & (place <= low + size)

    return np.any(
        [within(box.top, box.height)[:, None] & within(box.left, box.width)[None, :] for box in boxes], axis=0
    )


def _top_cells(values: np.ndarray, count: int) -> np.ndarray:
    """How much of each cell is among the `count` highest: 1, 0, or at the bound the same part of each."""
    bound = np.sort(values, axis=None)[-count]
    above, equal = values > bound, values == bound
    return above + equal * ((count - above.sum()) / equal.sum())
