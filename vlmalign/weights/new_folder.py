"""A folder that is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(folder: Path) -> None:
    """ValueError when something is there that an export would mix with or overwrite."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; choose a new folder, or remove it first")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """`<folder>.partial`, to be filled inside the `with`; it becomes `folder` when the body ends without an error.

    After an error nothing is left. A killed process leaves the `.partial` folder, which the next call replaces.

    Raises:
        ValueError: when `folder` exists and is not an empty folder.
    """
    check_new(folder)
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
