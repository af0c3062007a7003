"""Writes the list of modules in `docs/architecture.md`: one line each, the first sentence of its docstring.

python scripts/list_modules.py            # after adding, moving or renaming a module
python scripts/list_modules.py --check    # only say whether the list is up to date; exit code 1 if it is not
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from generated_page import main, with_part

REPOSITORY = Path(__file__).resolve().parent.parent
PACKAGE = REPOSITORY / "vlmalign"
PAGE = REPOSITORY / "docs" / "architecture.md"
BEGIN, END = "<!-- modules: written by scripts/list_modules.py -->", "<!-- end of modules -->"

_SENTENCE_END = re.compile(r"(?<=[.?!])\s+(?=[A-Z`\"{])")


def first_sentence(path: Path) -> str:
    """The first sentence of a module's docstring, on one line and without its full stop.

    Raises:
        ValueError: for a module without a docstring.
    """
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not docstring:
        raise ValueError(f"{path.relative_to(REPOSITORY)} has no docstring; say in a sentence what it is for")
    paragraph = " ".join(docstring.split("\n\n")[0].split())
    return _SENTENCE_END.split(paragraph)[0].rstrip(".:")


def folders() -> Iterator[Path]:
    """The package and its packages at any depth: a room, then the rooms within it."""
    yield from sorted(path.parent for path in PACKAGE.rglob("__init__.py"))


def listing() -> str:
    """The list as Markdown: a heading for each folder, a line for each module."""
    lines = []
    for folder in folders():
        name = folder.relative_to(REPOSITORY).as_posix()
        files = [path for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
        lines += [f"### `{name}/`", "", first_sentence(folder / "__init__.py") + ".", ""]
        lines += [f"- `{path.relative_to(PACKAGE).as_posix()}`: {first_sentence(path)}" for path in files]
        lines += [""] if files else []
    return "\n".join(lines)


def page_with(text: str, modules: str) -> str:
    """`text` with the list between its markers replaced.

    Raises:
        ValueError: when the markers are not there once each, in order.
    """
    return with_part(text, PAGE, BEGIN, END, modules)


if __name__ == "__main__":
    sys.exit(main(__doc__, PAGE, lambda old: page_with(old, listing()), "list_modules"))
