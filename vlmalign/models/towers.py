"""Pictures, as a checkpoint's processor prepares them -> the arrays that its vision tower takes, in few static shapes."""

from __future__ import annotations

from typing import Union

import numpy as np

from vlmalign.models.config import QwenVisionConfig, SiglipConfig
from vlmalign.models.qwen_vision import Windows, lay_out, stack
from vlmalign.shapes import Array, Float
from vlmalign.types import Patches

#: what `Network.encode` takes: squares of pixels for SigLIP, windows of patches for Qwen2.5-VL
Pixels = Union[  # noqa: UP007 - without jaxtyping the annotations are Any
    Float[Array, "i channel height width"], Float[np.ndarray, "i channel height width"], Windows
]

#: one image: [channel, height, width] float32 for SigLIP
Picture = Union[np.ndarray, Patches]  # noqa: UP007


def size_class(config: SiglipConfig | QwenVisionConfig, picture: Picture) -> int:
    """A number shared by pictures that one compiled program can encode: the windows they are padded to, or 0.

    Windows grow by a half or a third from class to class (1, 2, 3, 4, 6, 8, 12 ...), so at most a third is padding.
    """
    if isinstance(config, SiglipConfig):
        return 0
    side = config.window * config.merge
    windows = -(-picture.rows // side) * -(-picture.columns // side)
    power = 1 << (windows - 1).bit_length()
    return power * 3 // 4 if power > 2 and windows <= power * 3 // 4 else power


def arrange(config: SiglipConfig | QwenVisionConfig, pictures: list[Picture]) -> Pixels:
    """Pictures of one size class side by side."""
    if isinstance(config, SiglipConfig):
        return np.stack(pictures)
    images = [lay_out(p.values, (p.rows, p.columns), config) for p in pictures]
    return stack(images, config, windows=max(size_class(config, p) for p in pictures))
