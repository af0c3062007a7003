"""JSON in a model's answer: read strictly, and found where it stands in a code fence or within other text."""

from __future__ import annotations

import json
import math
import re
from typing import Any

_FENCE = re.compile(r"```(?:json)?[ \t]*\n(.*)\n[ \t]*```", re.DOTALL)


def read_json(text: str) -> Any:
    """`text` as JSON. Raises ValueError for anything else, also where Python's reader would be lenient: NaN,
    infinities (also 1e999), a key given twice, nesting too deep to read."""
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def fenced(answer: str) -> str:
    """The text of the Markdown code fence that an answer consists of; else the answer."""
    found = _FENCE.fullmatch(answer)
    return found.group(1) if found else answer


def find_object(answer: str) -> dict[str, Any]:
    """The one JSON object of an answer: alone, in a code fence, or with text before and after it.

    Raises ValueError where there is none, and where what lies between the first and the last brace is not one object.

    >>> find_object('The plan: {"strategy": "ICSI"}.')
    {'strategy': 'ICSI'}
    """
    start, end = answer.find("{"), answer.rfind("}")
    if start < 0 or end < start:
        raise ValueError("expected a JSON object, found no braces")
    found = read_json(answer[start : end + 1])
    assert isinstance(found, dict)  # a JSON value that begins with a brace
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError("a number beyond the range of floats")
    return number


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found
