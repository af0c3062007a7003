"""Film files -> the pixels a vision tower expects, through the checkpoint's own image processor (PIL, no torch).

Two rules are known. Gemma 3 squeezes every film into one fixed square. Qwen2.5-VL keeps the film's shape: it is resized
to whole soft tokens within the folder's limits on pixels and cut into patches, so each film has its own number of soft
tokens; that number is read off the file's header, long before any film is decoded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmalign.data.images import BadImage, load_image
from vlmalign.types import Grid, Patches


@runtime_checkable
class PixelReader(Protocol):
    """The image side of a checkpoint folder; a key is the path of a JPEG or PNG file."""

    def grid(self, key: str) -> Grid:
        """How the image's soft tokens lie. Nothing is decoded: at most the file's header is read, once."""
        ...

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        """Pixels of each image: [channel, height, width] float32 for a tower of fixed size, else `Patches`."""
        ...


class FixedSquares:
    """Gemma 3: every film fills one square, whatever its shape, and has the same number of soft tokens."""

    def __init__(self, processor: BaseImageProcessor, *, image_tokens: int | None, exact: bool):
        side = math.isqrt(image_tokens or 0)
        if not image_tokens or side**2 != image_tokens:
            raise ValueError(f"image_tokens must be the square of a whole number, such as 256, found {image_tokens}")
        if processor.do_pan_and_scan:
            raise ValueError(
                "the image processor's do_pan_and_scan is true: it would cut one film into several images, which is "
                "not supported; set it to false in the folder's processor settings"
            )
        self._processor, self._grid = processor, Grid(side, side)
        self._hint = None if exact else max(processor.size["height"], processor.size["width"])

    def grid(self, key: str) -> Grid:
        """The same for every film; the file is not opened."""
        del key
        return self._grid

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        return [self._pixels(load_image(key, size_hint=self._hint)) for key in keys]

    def _pixels(self, image: np.ndarray) -> np.ndarray:
        pixels = self._processor(image, input_data_format="channels_last", return_tensors="np")["pixel_values"][0]
        return pixels.astype(np.float32, copy=False)


class DynamicResolution:
    """Qwen2.5-VL: a film keeps its shape; rows and columns of patches follow from its size (`smart_resize`)."""

    def __init__(self, processor: BaseImageProcessor, *, image_tokens: int | None, exact: bool):
        del image_tokens  # differs from film to film
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        if not low or not high or low > high:
            raise ValueError(
                "the image processor must limit the pixels of a film by min_pixels <= max_pixels (in newer folders "
                f"size.shortest_edge and size.longest_edge), found {low} and {high}"
            )
        self._processor, self._exact = processor, exact
        self._least, self._most = low, high
        self._unit = processor.patch_size * processor.merge_size  # pixels per side of a soft token
        self._sizes: dict[str, tuple[int, int]] = {}

    def grid(self, key: str) -> Grid:
        height, width = self._resized(key)
        return Grid(height // self._unit, width // self._unit)

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        return [self._patches(key) for key in keys]

    def _resized(self, key: str) -> tuple[int, int]:
        """(height, width) in pixels that the film is resized to."""
        if key not in self._sizes:
            height, width = image_size(key)
            try:
                size = smart_resize(height, width, self._unit, min_pixels=self._least, max_pixels=self._most)
            except ValueError as error:
                raise BadImage(f"{key}: {width} x {height} pixels cannot be cut into patches ({error})") from error
            self._sizes[key] = size
        return self._sizes[key]

    def _patches(self, key: str) -> Patches:
        height, width = self._resized(key)
        image = load_image(key, size_hint=None if self._exact else (height, width))
        # Resized here and not by the processor: of a film decoded at a fraction of its size, smart_resize could make
        # another number of patches than of the film itself.
        image = np.asarray(Image.fromarray(image).resize((width, height), resample=self._processor.resample))
        out = self._processor(image, do_resize=False, input_data_format="channels_last", return_tensors="np")
        _, rows, columns = (int(n) for n in out["image_grid_thw"][0])
        return Patches(out["pixel_values"].astype(np.float32, copy=False), rows, columns)


#: family -> how its films become pixels
PIXELS: dict[str, Callable[..., PixelReader]] = {"gemma3": FixedSquares, "qwen2_5_vl": DynamicResolution}


def open_pixels(folder: Path, *, family: str, image_tokens: int | None, exact: bool = False) -> PixelReader:
    """The reader for the processor settings in `folder`.

    `image_tokens` is the number of soft tokens of every image of a tower of fixed size (the others ignore it). A JPEG
    may be decoded at 1/2, 1/4 or 1/8 of its size where it is shrunk at least as much afterwards, which is several
    times faster and moves pixels by a few grey levels; `exact` switches that off.

    Raises:
        ValueError: when the family has no rule, or the settings do not fit it.
    """
    if family not in PIXELS:
        raise ValueError(f"no rule for the pixels of family {family!r}; known: {', '.join(PIXELS)}")
    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    if not processor.do_resize:
        raise ValueError(f"{folder}: the image processor's do_resize is false; films must be resized to fit the tower")
    return PIXELS[family](processor, image_tokens=image_tokens, exact=exact)


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels as the header of a JPEG or PNG says; nothing is decoded.

    Raises FileNotFoundError, and BadImage for a file that is neither or whose header is damaged.
    """
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            return image.height, image.width
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: unreadable image ({error}); restore the file or skip it") from error
