"""Decoding films: JPEG or PNG to 8 bits a channel, never a damaged one."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

#: Larger images are refused before they are decoded (a small file can unpack to gigabytes). The largest films of
#: MIMIC-CXR-JPG have about 10 million pixels.
MAX_PIXELS = 64_000_000
#: No film of so many pixels has a longer file, at 8 bytes a pixel (16-bit RGBA).
MAX_BYTES = 8 * MAX_PIXELS


class BadImage(ValueError):
    """An image that cannot be used; the message names its path and the reason."""


def load_image(path: str | Path, size_hint: int | tuple[int, int] | None = None) -> np.ndarray:
    """The image at `path` as uint8 [height, width, 3].

    Grey is repeated over the channels, 16-bit grey keeps its upper 8 bits, transparency is laid over black. With
    `size_hint` (pixels: one number or (height, width)) a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, which
    is faster; neither side falls below the hint, so resize afterwards. PNG ignores the hint.

    Raises FileNotFoundError, and BadImage for a file that is no JPEG or PNG, is truncated or damaged, has an
    unsupported pixel format, or has more than MAX_PIXELS pixels.
    """
    return np.asarray(decode_image(read_film(path), path, size_hint).convert("RGB"))


def read_film(path: str | Path) -> bytes:
    """The bytes of a film's file.

    Raises FileNotFoundError, and BadImage for a file that cannot be read or is longer than any film can be.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise BadImage(f"{path}: {size} bytes, more than the limit {MAX_BYTES}; this is no film")
            return file.read()
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except OSError as error:
        raise BadImage(f"{path}: unreadable image ({error}); restore the file or skip it") from error


def decode_image(
    data: bytes,
    name: str | Path,
    size_hint: int | tuple[int, int] | None = None,
    *,
    size: tuple[int, int] | None = None,
) -> Image.Image:
    """The image in a file's bytes, in Pillow's mode "L" (grey, one channel) or "RGB"; see `load_image`.

    With `size`, a (height, width) that was read earlier, an image whose header says another one is refused.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("ImageFile.LOAD_TRUNCATED_IMAGES is set: damaged films would load in part; unset it")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{name}: {image.width} x {image.height} pixels, more than the limit {MAX_PIXELS}")
            if size is not None and size != (image.height, image.width):
                raise BadImage(
                    f"{name}: {image.width} x {image.height} pixels, but {size[1]} x {size[0]} when it was looked at "
                    "before; the file was replaced in between: start again, and leave films alone while a run uses them"
                )
            if size_hint is not None:
                height, width = (size_hint, size_hint) if isinstance(size_hint, int) else size_hint
                image.draft(None, (width, height))
            image.load()
            return _plain(image, name)
    except BadImage:
        raise
    # Pillow reports damage through several types: OSError, SyntaxError (PNG chunks), ValueError, EOFError.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise BadImage(f"{name}: unreadable image ({error}); restore the file or skip it") from error


def _plain(image: Image.Image, name: str | Path) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadImage(f"{name}: pixel format {image.mode!r} is not supported; expected 8- or 16-bit grey, RGB or RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    # One channel stays one: most films are grey, and resizing three equal channels takes three times as long.
    return image.convert("L" if image.mode == "L" else "RGB")
