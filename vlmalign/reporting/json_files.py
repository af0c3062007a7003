"""Reads JSON, JSON Lines and YAML files. Errors name file and line and never quote them (they may hold patients' text)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from vlmalign.reporting.json_shape import check_shape


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
        return text.strip(), yaml.safe_load(text)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected UTF-8 text, found other bytes; restore the file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}, line {line}: not YAML ({error.problem}); correct the line") from None
    except yaml.YAMLError:
        raise ValueError(f"{path}: not YAML (a character it does not allow); restore the file") from None


def parse_json(content: bytes, path: Path, first_line: int) -> Any:
    """The JSON value in `content`, which begins at line `first_line` of the file at `path`. ValueError names both."""
    try:
        return json.loads(content.decode("utf-8"), parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        line, reason = first_line + error.lineno - 1, f"{error.msg} at column {error.colno}"
    except UnicodeDecodeError:
        line, reason = first_line, "bytes that are not UTF-8"
    except _NotANumber:
        line, reason = first_line, "NaN or an infinity, which JSON has not (write null)"
    except (ValueError, RecursionError):  # Python's own limits
        line, reason = first_line, "a number of thousands of digits, or brackets nested as deep"
    raise ValueError(f"{path}, line {line}: expected JSON, found {reason}; continue the run or restore the file")


class _NotANumber(Exception):
    pass


def _refuse_constant(name: str) -> Any:
    raise _NotANumber(name)
