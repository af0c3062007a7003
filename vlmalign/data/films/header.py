"""The size of a film as its header says, without decoding it."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from vlmalign.data.films.dicom import PREAMBLE, dicom_size, is_dicom
from vlmalign.data.films.files import damage_named, open_film
from vlmalign.data.films.orientation import header_turn, turned


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) in pixels, upright, as the header of a JPEG, PNG or DICOM file says.

    Only a PNG whose EXIF stands behind its pixels is decoded.

    Raises FileNotFoundError, and BadImage for another file or a damaged header.
    """
    with open_film(path) as file:
        head = file.read(PREAMBLE)
        file.seek(0)
        if is_dicom(head):
            return dicom_size(file, path)
        with damage_named(path, head), Image.open(file, formats=("JPEG", "PNG")) as image:
            return turned((image.height, image.width), header_turn(image, file))
