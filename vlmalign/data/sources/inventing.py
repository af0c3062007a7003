"""Invented data sets: a folder that is written whole or not at all, by whichever process comes first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

#: how the folder ends in which an invented data set is being written
PARTIAL = ".partial"


def write_folder(root: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` make and fill a folder, which then becomes `root`; a folder that exists is left as it is, also one that another
    process has written in the meantime."""
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{root.name}.", suffix=PARTIAL, dir=root.parent, ignore_cleanup_errors=True) as own:
        beside = Path(own) / root.name
        write(beside)
        try:
            beside.rename(root)
        except OSError:
            if not root.is_dir():
                raise
