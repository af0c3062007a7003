"""The bytes of a film's file: regular files only, of a length that a film can have; and what Pillow says of damage."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from PIL import UnidentifiedImageError

#: No film of 32 million pixels (`images.MAX_PIXELS`) has a longer file, at 8 bytes a pixel (16-bit RGBA).
MAX_BYTES = 8 * 32_000_000
#: what Git keeps in place of a file that was never fetched
_POINTER = b"version https://git-lfs.github.com/"


class BadImage(ValueError):
    """An image that cannot be used; the message names its path and the reason."""


def open_film(path: str | Path) -> BinaryIO:
    """The film's file, open for reading.

    Raises:
        FileNotFoundError: naming the path.
        BadImage: for what is no regular file, cannot be opened, or is longer than any film can be.
    """
    try:
        # Before it is opened: to open a named pipe would wait for its writer, for ever.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise BadImage(f"{path}: no regular file (a folder, pipe or device); a film is a file")
        file = open(path, "rb")  # noqa: SIM115 the caller closes it
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except OSError as error:
        raise BadImage(f"{path}: unreadable image ({error.strerror}); restore the file or skip it") from error
    size = os.fstat(file.fileno()).st_size
    if size > MAX_BYTES:
        file.close()
        raise BadImage(f"{path}: {size} bytes, more than the limit {MAX_BYTES}; this is no film")
    return file


def read_film(path: str | Path) -> bytes:
    """The bytes of a film's file; raises as `open_film` does, and BadImage for a file that cannot be read."""
    with open_film(path) as file:
        try:
            return file.read()
        except OSError as error:
            raise BadImage(f"{path}: unreadable image ({error.strerror}); restore the file or skip it") from error


@contextlib.contextmanager
def damage_named(name: str | Path, head: bytes) -> Iterator[None]:
    """Turns what Pillow raises for a film that begins with `head` into BadImage, naming the film."""
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:  # its own text holds an address in memory
        reason = "it is no JPEG, PNG or DICOM file"
        if head.startswith(_POINTER):
            reason = "it is a Git LFS pointer and not the film itself: run `git lfs pull`"
        raise BadImage(f"{name}: unreadable image ({reason}); restore the file or skip it") from None
    # Of whatever type: OSError, SyntaxError and IndexError (PNG chunks), ValueError, EOFError, DecompressionBombError.
    except Exception as error:
        raise BadImage(f"{name}: unreadable image ({error}); restore the file or skip it") from error
