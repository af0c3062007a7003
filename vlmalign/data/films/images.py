"""Decoding films: JPEG, PNG or DICOM to 8 bits a channel, upright, never a damaged one."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from vlmalign.data.films.depth import is_deep, upper_bits
from vlmalign.data.films.dicom import decode_dicom, is_dicom
from vlmalign.data.films.files import MAX_BYTES, BadImage, damage_named, read_film
from vlmalign.data.films.orientation import turn_of, turned, upright

__all__ = ["MAX_BYTES", "MAX_PIXELS", "BadImage", "decode_image", "load_image", "read_film"]

#: Larger images are refused before they are decoded (a small file can unpack to gigabytes; one of this size takes up to
#: 480 MB, with transparency, while it is decoded). The largest films of MIMIC-CXR-JPG have about 10 million pixels, the
#: largest detectors 18.
MAX_PIXELS = 32_000_000


def load_image(path: str | Path, size_hint: int | tuple[int, int] | None = None, *, bits: int = 16) -> np.ndarray:
    """The image at `path` as uint8 [height, width, 3], upright as its EXIF orientation says.

    Grey is repeated over the channels, 16-bit grey keeps the upper 8 of its `bits` bits, transparency is laid over
    black, CMYK becomes RGB. With `size_hint` (pixels: one number or (height, width)) a JPEG may be decoded at 1/2, 1/4
    or 1/8 of its size, which is faster; neither side falls below the hint, so resize afterwards. PNG and DICOM ignore
    the hint. DICOM: see `dicom.decode_dicom`.

    Raises FileNotFoundError, and BadImage for a file that is no JPEG, PNG or DICOM, is truncated or damaged, has an
    unsupported pixel format, more than MAX_PIXELS pixels, or grey levels that do not fit into `bits`.
    """
    return np.asarray(decode_image(read_film(path), path, size_hint, bits=bits).convert("RGB"))


def decode_image(
    data: bytes,
    name: str | Path,
    size_hint: int | tuple[int, int] | None = None,
    *,
    size: tuple[int, int] | None = None,
    bits: int = 16,
) -> Image.Image:
    """The image in a file's bytes, in Pillow's mode "L" (grey, one channel) or "RGB"; see `load_image`.

    With `size`, a (height, width) that was read earlier, an image of another size is refused.
    """
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        raise RuntimeError("ImageFile.LOAD_TRUNCATED_IMAGES is set: damaged films would load in part; unset it")
    if is_dicom(data):
        film = decode_dicom(data, name, max_pixels=MAX_PIXELS)
        _refuse_other_size(name, (film.height, film.width), size)
        return film
    with damage_named(name, data), Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(f"{name}: {image.width} x {image.height} pixels, more than the limit {MAX_PIXELS}")
        turn = turn_of(image)
        _refuse_other_size(name, turned((image.height, image.width), turn), size)
        if size_hint is not None:
            hint = (size_hint, size_hint) if isinstance(size_hint, int) else size_hint
            image.draft(None, turned(hint, turn)[::-1])
        image.load()
        if is_deep(data) and (image.mode.startswith("I;16") or bits != 16):
            return upright(upper_bits(image, bits, name), turn)
        return upright(_plain(image, name), turn)


def _refuse_other_size(name: str | Path, found: tuple[int, int], size: tuple[int, int] | None) -> None:
    if size is not None and size != found:
        raise BadImage(
            f"{name}: {found[1]} x {found[0]} pixels, but {size[1]} x {size[0]} when it was looked at before; the file was "
            "replaced in between: start again, and leave films alone while a run uses them"
        )


def _plain(image: Image.Image, name: str | Path) -> Image.Image:
    if image.mode in ("I", "F"):
        raise BadImage(f"{name}: pixel format {image.mode!r} is not supported; expected 8- or 16-bit grey, RGB or RGBA")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, image.convert("RGBA"))
    # One channel stays one: most films are grey, and resizing three equal channels takes three times as long.
    return image.convert("L" if image.mode == "L" else "RGB")
