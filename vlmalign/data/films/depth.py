"""Films of more than 8 bits a channel: which of their bits are used, and the upper 8 of those.

A detector of 12 bits often fills a PNG of 16: its upper 8 bits then hold grey levels 0 to 15 of 255, and every film looks
black. Nothing in the file says so, so a source says it (`bits: 12`), and a set of films that look like it is refused
without.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from vlmalign.data.films.files import BadImage, damage_named, open_film

#: a set of 16-bit films whose largest value is below this holds 12 bits at most
TWELVE_BITS = 2**12
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: where the header chunk says how many bits a channel has
_DEPTH = 24


def is_deep(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a PNG of 16 bits a channel."""
    return head.startswith(_SIGNATURE) and head[_DEPTH : _DEPTH + 1] == b"\x10"


def upper_bits(image: Image.Image, bits: int, name: str | Path) -> Image.Image:
    """A loaded film of 16-bit grey as 8 bits: the upper 8 of its `bits` bits.

    Raises BadImage for levels that do not fit into `bits`, and for colour or transparency, whose lower bits are lost.
    """
    if not image.mode.startswith("I;16"):
        raise BadImage(f"{name}: 16-bit colour or transparency cannot be read as {bits} bits; write it as 16-bit grey")
    levels = np.asarray(image).astype(np.uint16)
    if (largest := int(levels.max())) >= 2**bits:
        raise BadImage(f"{name}: a grey level of {largest}, more than {bits} bits hold; correct the source's bits")
    return Image.fromarray((levels >> (bits - 8)).astype(np.uint8))


def check_depth(paths: Iterable[str | Path], *, bits: int = 16) -> None:
    """Raises ValueError where films of 16-bit grey or colour, taken together, use no more than 12 bits of them.

    Only headers are read until a film of 16 bits is met, and nothing after the first that uses more than 12. Films of 8
    bits and DICOM files, which say how many bits they use, are passed over; so is everything where `bits` is not 16.

    Raises:
        FileNotFoundError, BadImage: naming a film that cannot be read.
    """
    largest, first = -1, None
    for path in paths if bits == 16 else ():
        with open_film(path) as file:
            head = file.read(_DEPTH + 1)
            file.seek(0)
            if not is_deep(head):
                continue
            with damage_named(path, head), Image.open(file, formats=("PNG",)) as image:
                levels = np.asarray(image)
        # Pillow keeps the upper 8 bits of colour.
        greatest = int(levels.max()) if levels.dtype != np.uint8 else 256 * int(levels.max()) + 255
        if greatest >= TWELVE_BITS:
            return
        largest, first = max(largest, greatest), first or path
    if first is not None:
        raise ValueError(
            f"{first}: a film of 16 bits, and no level of the films read here is above {largest}: they hold at most 12 bits "
            "and would be read as nearly black; set the source's bits to 12 (10, 14: what the detector gave)"
        )
