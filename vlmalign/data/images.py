"""Decoding films: JPEG or PNG to uint8 [height, width, 3], never a damaged one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

#: Larger images are refused before they are decoded (a small file can unpack to gigabytes). The largest films of
#: MIMIC-CXR-JPG have about 10 million pixels.
MAX_PIXELS = 64_000_000


class BadImage(ValueError):
    """An image that cannot be used; the message names its path and the reason."""


def load_image(path: str | Path, size_hint: int | tuple[int, int] | None = None) -> np.ndarray:
    """The image at `path` as uint8 [height, width, 3].

    Grey is repeated over the channels, 16-bit grey keeps its upper 8 bits, transparency is laid over black. With
    `size_hint` (pixels: one number or (height, width)) a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which
    is several times faster; neither side falls below the hint, so resize afterwards. PNG ignores the hint.

    Raises FileNotFoundError, and BadImage for a file that is no JPEG or PNG, is truncated or damaged, has an
    unsupported pixel format, or has more than MAX_PIXELS pixels.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("ImageFile.LOAD_TRUNCATED_IMAGES is set: damaged films would load in part; unset it")
    try:
        with Image.open(path, formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{path}: {image.width} x {image.height} pixels, more than the limit {MAX_PIXELS}")
            if size_hint is not None:
                height, width = (size_hint, size_hint) if isinstance(size_hint, int) else size_hint
                image.draft(None, (width, height))
            image.load()
            return _to_rgb(image, path)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except BadImage:
        raise
    # Pillow reports damage through several types: OSError, SyntaxError (PNG chunks), ValueError, EOFError.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"{path}: unreadable image ({error}); restore the file or skip it") from error


def _to_rgb(image: Image.Image, path: str | Path) -> np.ndarray:
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise BadImage(f"{path}: pixel format {image.mode!r} is not supported; expected 8- or 16-bit grey, RGB or RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))
