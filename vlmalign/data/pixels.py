"""Film files -> the normalised pixels a tower expects, through the checkpoint's own image processor (PIL, no torch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from transformers import AutoImageProcessor

from vlmalign.data.images import load_image

#: paths -> pixels [i, channel, height, width] float32
PixelReader = Callable[[Sequence[Path]], np.ndarray]


def open_pixels(folder: Path) -> PixelReader:
    """A function that loads films and prepares them as the processor settings in `folder` say, float32."""
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    side = max(processor.size["height"], processor.size["width"])

    def read(paths: Sequence[Path]) -> np.ndarray:
        images = [load_image(path, size_hint=side) for path in paths]
        pixels = [processor(image, return_tensors="np")["pixel_values"][0] for image in images]
        return np.stack(pixels).astype(np.float32, copy=False)

    return read
