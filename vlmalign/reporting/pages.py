"""How every page of the reporting room is made and written: one template environment, files replaced in one go."""

from __future__ import annotations

import base64
import hashlib
import os
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from vlmalign.reporting import visible_text, words

HERE = Path(__file__).resolve().parent
_WORDS = ("number", "p_value", "signed", "bounds", "share", "count", "duration", "measured")


@cache
def environment(folder: Path = HERE) -> jinja2.Environment:
    """The templates of a folder: everything escaped, an unknown name an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {name: getattr(words, name) for name in _WORDS}
    made.filters |= {"visible": visible_text.visible, "plain": visible_text.plain}
    return made


def stylesheet(*names: str) -> Markup:
    """The style sheets of this folder, one after the other, for a page's own style element."""
    return Markup("\n".join((HERE / name).read_text(encoding="utf-8") for name in names))


def allowed(script: str) -> str:
    """The source that a Content-Security-Policy's script-src names for a page's one script: should a model's text ever
    become markup, it still could not run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")


def write_page(path: Path, page: str) -> None:
    """Write `page` to `path`; an older page stays until this one is complete."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        # A model's text can hold half a surrogate pair, which UTF-8 has not: it becomes a question mark.
        part.write_bytes(page.encode("utf-8", errors="replace"))
        part.chmod(path.parent.stat().st_mode & 0o666)  # for those who may read the folder
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
