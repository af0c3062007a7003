"""Images of a prompt as a page of the run folder may name them: by relative link, never copied, never by machine path.

A log names an image by its key: see `image_places`; also any other name. Inside the run folder the link and the words
are relative to it, so the folder can be moved. Of an image elsewhere the words are the file's name alone: the folders
above it may name a patient or the machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from vlmalign.reporting.image_places import image_places

#: what browsers show; a DICOM file gets a link without a picture
SHOWN = (".png", ".jpg", ".jpeg", ".gif", ".webp")


class ImageLink(NamedTuple):
    """How to show one image."""

    words: str  #: not yet escaped
    href: str | None  #: relative to the page, percent-encoded; None: no such file here
    shown: bool  #: a browser can show it


def image_links(run: Path, folder: Path) -> Callable[[str], ImageLink]:
    """The function from a key to its link, for pages that lie in `folder`, inside the run folder `run`."""
    top, page = os.path.abspath(run), os.path.abspath(folder)
    # A log may name the folder as it was opened or as it is once links are followed.
    roots = (top, os.path.realpath(run))
    place = image_places(Path(top))

    @cache
    def link(key: str) -> ImageLink:
        path = os.path.normpath(os.path.join(top, place(key)))
        found = os.path.isfile(path)
        if not found and not os.path.isabs(key):
            return ImageLink(key, None, False)
        inside = next((os.path.relpath(path, root) for root in roots if path.startswith(root + os.sep)), None)
        words = os.path.basename(path) if inside is None else inside
        if not found:
            return ImageLink(words, None, False)
        # Browsers go up from the page's address as it is written, whatever links lie on the way.
        href = os.path.relpath(path if inside is None else os.path.join(top, inside), page)
        return ImageLink(words, quote(os.fsencode(href)), path.lower().endswith(SHOWN))

    return link
