"""A page of the documentation that is written from the code: written anew, or with --check only compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def with_part(text: str, page: Path, begin: str, end: str, part: str) -> str:
    """`text` with what stands between two markers replaced by `part`.

    Raises:
        ValueError: when the markers are not there once each, in order.
    """
    before, first, rest = text.partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last or begin in rest or end in after:
        raise ValueError(f"{page.name} must hold {begin!r} and then {end!r}, once each")
    return f"{before}{begin}\n\n{part}\n{end}{after}"


def main(description: str, page: Path, page_with: Callable[[str], str], script: str) -> int:
    """The command of a script that writes `page`; `page_with` makes its text from the one that is there."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not up to date")
    check = parser.parse_args().check
    old = page.read_text(encoding="utf-8")
    new = page_with(old)
    if check and new != old:
        print(f"docs/{page.name} does not show the code as it is; run: python scripts/{script}.py")
        return 1
    if not check:
        page.write_text(new, encoding="utf-8")
    return 0
