"""Films as the browser gets them: pixels alone, as PNG, without the file's name, its comments or EXIF data.

They are shown as models read them: 8 bits a channel, upright; of DICOM with its own window applied. The page's window and
level work on those.
"""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path

from vlmalign.data.films.images import BadImage, decode_image, read_film
from vlmalign.review.material import Film, Material

CACHE = "films"


def png(film: Film, folder: Path) -> bytes:
    """The film as PNG; kept in the study's folder under the SHA-256 of its file, so that it is decoded once.

    Raises:
        BadImage: for a file that is no film.
    """
    path = folder / CACHE / f"{film.sha256}.png"
    if path.is_file():
        return path.read_bytes()
    image = decode_image(read_film(film.path), film.path)
    image = image if image.mode == "L" else image.convert("RGB")
    image.info.clear()  # what stood in the file beside its pixels
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=3)
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.write_bytes(out.getvalue())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return out.getvalue()


def unreadable(material: Material) -> list[str]:
    """What is wrong with each film that cannot be decoded, so that it is found before a reader sees it."""
    cases = [*material.cases.values(), *(known.case for known in material.known.values())]
    found = []
    for path in dict.fromkeys(film.path for case in cases for film in case.films):
        try:
            decode_image(read_film(path), path)
        except BadImage as error:
            found.append(str(error))
    return found
