"""Reads JSON, JSON Lines and YAML files. Errors name file and line and never quote them (they may hold patients' text)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from vlmalign.config_yaml import read_yaml as read_yaml_text
from vlmalign.reporting.json_shape import check_shape

#: of a whole number
MOST_DIGITS = 300


def read_object(path: Path, shape: Any) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is no file or it is empty."""
    if not path.is_file() or not (content := path.read_bytes().strip()):
        return None
    value = parse_json(content, path, 1)
    check_shape(value, shape, str(path))
    return value


def read_rows(path: Path, shape: Any) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file; none if there is no file."""
    if not path.is_file():
        return []
    rows = []
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines if lines != [b""] else (), start=1):
        row = parse_json(line, path, number)
        check_shape(row, shape, f"{path}, line {number}")
        rows.append(row)
    return rows


def read_yaml(path: Path) -> tuple[str, Any]:
    """The text as it was written, comments and all, and what it says."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, found other bytes; restore the file") from None
    try:
        return text.strip(), read_yaml_text(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; correct or restore the file") from None


def parse_json(content: bytes, path: Path, first_line: int) -> Any:
    """The JSON value in `content`, which begins at line `first_line` of the file at `path`. ValueError names both."""
    try:
        return json.loads(
            content.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except UnicodeDecodeError:
        line, reason = first_line, "bytes that are not UTF-8"
    except _NotANumber:
        line, reason = first_line, "NaN or an infinity, which JSON has not (write null)"
    except (ValueError, RecursionError):
        line, reason = first_line, f"a number of more than {MOST_DIGITS} digits, or brackets nested in thousands"
    raise ValueError(f"{path}, line {line}: expected JSON, found {reason}; continue the run or restore the file")


class _NotANumber(Exception):
    pass


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise _NotANumber(text)
    return number


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:  # beyond the range of floats, in which numbers are compared and written
        raise ValueError(text)
    return int(text)


def _refuse_constant(name: str) -> Any:
    raise _NotANumber(name)
