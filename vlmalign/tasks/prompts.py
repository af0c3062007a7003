"""A task's prompt with the columns of a row filled in, and the user turn made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from vlmalign.quoting import shown

if TYPE_CHECKING:  # the rewards read completions through this room, in workers that should start without numpy
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example


def _read(prompt: Any) -> Any:
    """The text of `{file: PATH}`; the path starts from the working directory, as all of a config's do."""
    if not isinstance(prompt, Mapping):
        return prompt
    if list(prompt) != ["file"] or not isinstance(prompt["file"], str):
        raise ValueError(
            f"expected a text, or {{file: PATH}}, found a section with {', '.join(map(str, prompt)) or 'nothing'}"
        )
    try:
        return Path(prompt["file"]).read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise ValueError(f"{prompt['file']} is not UTF-8 text") from None
    except OSError as error:
        raise ValueError(f"{prompt['file']}: {error.strerror}; the working directory is {Path.cwd()}") from None


#: a text, or `{file: PATH}`, which is read when the config is: what a run keeps is the text
Prompt = Annotated[str, BeforeValidator(_read)]
#: columns that a message lists
SHOWN = 20

_SLOT = re.compile(r"\{(\{[A-Za-z_]\w*\})\}|\{([A-Za-z_]\w*)\}")


def fill(prompt: str, columns: Mapping[str, Any]) -> str:
    """`prompt` with each {name} replaced by that column; {{name}} stands for {name}, and other braces for themselves.

    Numbers are written as Python writes them, lists and objects as JSON, null as nothing. Raises ValueError naming a
    column that the row does not have.

    >>> fill('A {age}-year-old. Answer as {"label": ...}.', {"age": 61})
    'A 61-year-old. Answer as {"label": ...}.'
    """

    def put(found: re.Match[str]) -> str:
        literal, name = found.groups()
        if literal is not None:
            return literal
        if name not in columns:
            has = _listing(columns)
            raise ValueError(f"the prompt names the column {name!r}, found {has}; add it, or write {{{{{name}}}}}")
        value = columns[name]
        if isinstance(value, str):
            return value
        return "" if value is None else json.dumps(value, ensure_ascii=False)

    return _SLOT.sub(put, prompt)


def slots(prompt: str) -> list[str]:
    """The columns that a prompt names.

    >>> slots("A {age}-year-old. Write {{age}}.")
    ['age']
    """
    return [name for _, name in _SLOT.findall(prompt) if name]


def _listing(columns: Iterable[str]) -> str:
    """Names of a row's columns, in a message."""
    names = sorted(columns)
    more = ", ..." if len(names) > SHOWN else ""
    return ", ".join(map(shown, names[:SHOWN])) + more if names else "no columns"


def user_turn(example: Example, text: str) -> list[Message]:
    """One user turn: the example's image, if it has one, then the text."""
    if example.image is None:
        return [{"role": "user", "content": text}]
    parts = [{"type": "image", "image": str(example.image)}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def own_columns(example: Example) -> dict[str, Any]:
    """The row's own columns, which rewards may ask for; its conversation is what they are given as the prompt."""
    return {name: value for name, value in example.meta.items() if name != "messages"}


def column(example: Example, name: str) -> Any:
    """A column of the example. Raises ValueError naming the example and the columns it has."""
    if name not in example.meta:
        has = _listing(example.meta)
        raise ValueError(f"{example.id} has no column {name!r}, found {has}; name the column in the task")
    return example.meta[name]
