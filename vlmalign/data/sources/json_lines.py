"""JSON Lines files: their lines and the objects in them, with errors that quote none of a line (it may be a patient's)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Line(NamedTuple):
    """A line that is not empty."""

    number: int  #: from 1
    offset: int  #: in bytes
    text: bytes


def lines(path: Path) -> Iterator[Line]:
    """Every line that is not empty; FileNotFoundError naming the path."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    offset = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                yield Line(number, offset, text)
            offset += len(text)


def parse(line: bytes) -> dict[str, Any]:
    """The object in a line; ValueError for anything else, and for text that cannot be written as UTF-8."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("not a line of JSON that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected an object, found {type(row).__name__}")
    if b"\\ud" in line or b"\\uD" in line:  # the only way to half a character
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError(
                "a text holds half of a character (a lone \\ud800 to \\udfff); write it as UTF-8"
            ) from None
    return row


def read_texts(path: Path, key: str, value: str) -> dict[str, str]:
    """`key` -> `value` of every line of {key: text, value: text}; other fields are left alone.

    Raises:
        ValueError: naming file and line, for a line without these two, or a key that is there twice.
    """
    found: dict[str, str] = {}
    for number, _, text in lines(path):
        where = f"{path}, line {number}"
        try:
            row = parse(text)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        if not isinstance(row.get(key), str) or not isinstance(row.get(value), str):
            raise ValueError(f'{where}: expected {{"{key}": text, "{value}": text}}')
        if row[key] in found:
            raise ValueError(f'{where}: the "{key}" of an earlier line again')
        found[row[key]] = row[value]
    return found
