"""Grey levels -> the tower's numbers: what an image processor's rescaling and normalising make of each of 256 levels.

Both work on every pixel alone, so their result has at most 256 values per channel. Looking them up gives the very
numbers of the processor in a fraction of its time (`scripts/bench/input.py`).
"""

from __future__ import annotations

import numpy as np
from transformers import BaseImageProcessor


def level_table(processor: BaseImageProcessor) -> np.ndarray:
    """[3, 256] float32: the value of every level in every channel, computed by the processor itself."""
    levels = np.broadcast_to(np.arange(256, dtype=np.uint8), (3, 1, 256))  # channel, height, width
    if processor.do_rescale:
        levels = processor.rescale(levels, processor.rescale_factor)
    if processor.do_normalize:
        levels = processor.normalize(levels, processor.image_mean, processor.image_std)
    return np.ascontiguousarray(levels[:, 0], np.float32)


def look_up(table: np.ndarray, film: np.ndarray) -> np.ndarray:
    """[3, height, width] float32 of a film, uint8 [height, width] (grey) or [height, width, 3]."""
    values = np.empty((3, *film.shape[:2]), np.float32)
    grey = film.ndim == 2
    for channel in range(3):
        if grey and channel and np.array_equal(table[channel], table[0]):
            values[channel] = values[0]
        else:
            # Every uint8 is a place in the table; without "clip" numpy checks that, and copies once more.
            np.take(table[channel], film if grey else film[:, :, channel], out=values[channel], mode="clip")
    return values
