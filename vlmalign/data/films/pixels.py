"""Film files -> the pixels a vision tower expects, equal to those of the checkpoint's own image processor (PIL, no torch).

Two rules are known. Gemma 3 squeezes every film into one fixed square. Qwen2.5-VL keeps the film's shape: it is resized
to whole soft tokens within the folder's limits on pixels and cut into patches, so each film has its own number of soft
tokens; that number is read off the file's header, long before any film is decoded.

Reading is two steps (`reading.TwoStepReader`): the film's file to a small uint8 film, and that to the tower's numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from vlmalign.data.films.files import BadImage
from vlmalign.data.films.header import image_size
from vlmalign.data.films.levels import level_table, look_up
from vlmalign.data.films.reading import PixelReader, TwoStepReader
from vlmalign.data.films.resize import Recipe, load_film
from vlmalign.data.films.resize_cache import ResizeCache
from vlmalign.quoting import MOST_OF_LINE, shown
from vlmalign.types import Grid, Patches

__all__ = ["PIXELS", "DynamicResolution", "FixedSquares", "PixelReader", "image_size", "open_pixels"]

GIB = 2**30


class FixedSquares:
    """Gemma 3: every film fills one square, whatever its shape, and has the same number of soft tokens."""

    def __init__(
        self,
        processor: BaseImageProcessor,
        *,
        image_tokens: int | None,
        exact: bool = False,
        cache: ResizeCache | None = None,
        bits: Mapping[Path, int] = {},
    ):
        side = math.isqrt(image_tokens or 0)
        if not image_tokens or side**2 != image_tokens:
            raise ValueError(f"image_tokens must be the square of a whole number, such as 256, found {image_tokens}")
        if processor.do_pan_and_scan:
            raise ValueError(
                "the image processor's do_pan_and_scan is true: it would cut one film into several images, which is "
                "not supported; set it to false in the folder's processor settings"
            )
        height, width = processor.size["height"], processor.size["width"]
        if not height or not width:
            raise ValueError(f"the image processor's size must give height and width in pixels, found {processor.size}")
        self._grid, self.cache, self._bits = Grid(side, side), cache, bits
        self._recipe = Recipe(height, width, int(processor.resample), reduce=not exact)
        self._table = level_table(processor)
        _check(processor, lambda *_: (height, width), self.finish)

    def grid(self, key: str) -> Grid:
        """The same for every film; the file is not opened."""
        del key
        return self._grid

    def recipe(self, key: str) -> Recipe:
        return self._recipe._replace(bits=_bits_of(key, self._bits))

    def finish(self, film: np.ndarray) -> np.ndarray | Patches:
        return look_up(self._table, film)

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        return [self.finish(load_film(key, self.recipe(key), self.cache)) for key in keys]


class DynamicResolution:
    """Qwen2.5-VL: a film keeps its shape; rows and columns of patches follow from its size (`smart_resize`)."""

    def __init__(
        self,
        processor: BaseImageProcessor,
        *,
        image_tokens: int | None = None,
        exact: bool = False,
        cache: ResizeCache | None = None,
        bits: Mapping[Path, int] = {},
    ):
        del image_tokens  # differs from film to film
        low, high = processor.size["shortest_edge"], processor.size["longest_edge"]
        if not low or not high or low > high:
            raise ValueError(
                "the image processor must limit the pixels of a film by min_pixels <= max_pixels (in newer folders "
                f"size.shortest_edge and size.longest_edge), found {low} and {high}"
            )
        self._processor, self._exact, self.cache, self._bits = processor, exact, cache, bits
        self._least, self._most = low, high
        self._unit = processor.patch_size * processor.merge_size  # pixels per side of a soft token
        self._table = level_table(processor)
        self._recipes: dict[str, Recipe] = {}
        _check(processor, self._resized, self.finish)

    def grid(self, key: str) -> Grid:
        recipe = self.recipe(key)
        return Grid(recipe.height // self._unit, recipe.width // self._unit)

    def recipe(self, key: str) -> Recipe:
        """The size that transformers would resize the film to; its file must then be the one whose header was read."""
        if key not in self._recipes:
            height, width = source = image_size(key)
            try:
                size = self._resized(height, width)
            except ValueError as error:
                raise BadImage(f"{key}: {width} x {height} pixels cannot be cut into patches ({error})") from error
            self._recipes[key] = Recipe(
                *size,
                int(self._processor.resample),
                reduce=not self._exact,
                source=source,
                bits=_bits_of(key, self._bits),
            )
        return self._recipes[key]

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        return smart_resize(height, width, self._unit, min_pixels=self._least, max_pixels=self._most)

    def finish(self, film: np.ndarray) -> np.ndarray | Patches:
        # Not the whole processor: of a film decoded at a fraction of its size, its smart_resize could make another
        # number of patches than of the film itself.
        settings = self._processor
        values, rows, columns = settings.patchify(
            look_up(self._table, film), settings.patch_size, settings.merge_size, settings.temporal_patch_size
        )
        return Patches(values, rows, columns)

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        return [self.finish(load_film(key, self.recipe(key), self.cache)) for key in keys]


#: family -> how its films become pixels
PIXELS: dict[str, Callable[..., TwoStepReader]] = {"gemma3": FixedSquares, "qwen2_5_vl": DynamicResolution}


def open_pixels(
    folder: Path,
    *,
    family: str,
    image_tokens: int | None,
    exact: bool = False,
    cache: Path | None = None,
    cache_bytes: int = 64 * GIB,
    bits: Mapping[Path, int] = {},
) -> TwoStepReader:
    """The reader for the processor settings in `folder`.

    `image_tokens` is the number of soft tokens of every image of a tower of fixed size (the others ignore it). A JPEG
    may be decoded at 1/2, 1/4 or 1/8 of its size where it is shrunk at least as much afterwards, which is faster and
    moves pixels by a few grey levels; `exact` switches that off. Resized films are kept in the folder `cache`, at most
    `cache_bytes` of them; the pixels are the same with and without it. `bits` gives, for folders of films, how many bits
    their 16-bit films use (`depth`): the longest folder that holds a film counts, 16 elsewhere.

    Raises:
        ValueError: when the family has no rule, or the settings do not fit it.
    """
    if family not in PIXELS:
        raise ValueError(f"no rule for the pixels of family {family!r}; known: {', '.join(PIXELS)}")
    try:
        processor = AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as error:  # of whatever type: the library takes the files for what it has written
        why = f"{type(error).__name__}: {shown(' '.join(str(error).split()), MOST_OF_LINE)}"
        raise ValueError(
            f"{folder}: the image settings cannot be opened ({why}); copy them from the original"
        ) from error
    if not processor.do_resize:
        raise ValueError(f"{folder}: the image processor's do_resize is false; films must be resized to fit the tower")
    films = None if cache is None else ResizeCache(cache, limit=cache_bytes)
    # Keys are paths with links followed, as sources give them.
    folders = {Path(root).resolve(): count for root, count in bits.items()}
    return PIXELS[family](processor, image_tokens=image_tokens, exact=exact, cache=films, bits=folders)


def _bits_of(key: str, bits: Mapping[Path, int]) -> int:
    holding = [root for root in bits if Path(key).is_relative_to(root)]
    return bits[max(holding, key=lambda root: len(root.parts))] if holding else 16


def _check(
    processor: BaseImageProcessor,
    size: Callable[[int, int], tuple[int, int]],
    finish: Callable[[np.ndarray], np.ndarray | Patches],
) -> None:
    """Raises ValueError unless noise comes out as the processor itself has it: it may have settings we do not know.

    `size`: (height, width) of a film -> that after resizing.
    """
    noise = np.random.default_rng(0).integers(0, 256, (36, 45, 3), dtype=np.uint8)
    expected = processor(noise, input_data_format="channels_last", return_tensors="np")["pixel_values"]
    height, width = size(*noise.shape[:2])
    found = finish(np.asarray(Image.fromarray(noise).resize((width, height), resample=processor.resample)))
    if not np.array_equal(found.values if isinstance(found, Patches) else found[None], expected.astype(np.float32)):
        raise ValueError(
            f"the image processor {type(processor).__name__} does more than resize, rescale and normalise a film; its "
            "settings or its version are not supported"
        )
