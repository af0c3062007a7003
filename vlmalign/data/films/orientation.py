"""Which way up a film is stored: the orientation that EXIF or XMP gives, as transformers' `load_image` applies it."""

from __future__ import annotations

from typing import BinaryIO

from PIL import Image
from PIL.ExifTags import Base

#: value of the tag -> what turns the stored pixels upright; anything else leaves them
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (5, 6, 7, 8)
_IN_HEADER = ("exif", "Raw profile type exif", "XML:com.adobe.xmp")
#: chunks of a PNG that may hold the tag, and the keywords that they then begin with
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")


def turn_of(image: Image.Image) -> int | None:
    """The tag's value where it says that the pixels must be turned. A PNG without EXIF in its header is decoded.

    Raises what Pillow raises for a damaged PNG. EXIF that is damaged itself says nothing, as for transformers.
    """
    if image.format == "PNG" and "exif" not in image.info:
        image.load()
    tag = image.getexif().get(Base.Orientation)
    return tag if isinstance(tag, int) and tag in _TURNS else None


def upright(image: Image.Image, turn: int | None) -> Image.Image:
    """The image turned by `turn_of`."""
    return image if turn is None else image.transpose(_TURNS[turn])


def turned(size: tuple[int, int], turn: int | None) -> tuple[int, int]:
    """A (height, width) as stored -> upright, or back."""
    return size[::-1] if turn in _SIDEWAYS else size


def header_turn(image: Image.Image, file: BinaryIO) -> int | None:
    """`turn_of`, decoding a PNG only where a chunk behind its pixels may hold the tag."""
    if image.format != "PNG" or any(key in image.info for key in _IN_HEADER):
        return turn_of(image)
    place = file.tell()
    tagged = _tagged(file)
    file.seek(place)  # Pillow reads on from here
    return turn_of(image) if tagged else None


def _tagged(file: BinaryIO) -> bool:
    """Whether a chunk of the PNG may give an orientation; a file that is cut short is looked at as far as it goes."""
    file.seek(8)
    while len(head := file.read(8)) == 8:
        length, kind = int.from_bytes(head[:4]), head[4:]
        if kind == b"eXIf":
            return True
        taken = file.read(min(length, 32)) if kind in _TEXTS else b""
        if taken.startswith(_KEYWORDS):
            return True
        file.seek(length - len(taken) + 4, 1)  # the checksum stands behind
    return False
