"""Does a JSON value have the shape its reader expects? If not: an error that names the place, and never the value.

A shape is written as plain data: a type, a tuple of types, `[shape]` for a list, `{"key": shape}` for an object that
has at least these keys, `Values(shape)` for an object with any keys, `Maybe(shape)` for a value that may be null.
"""

from __future__ import annotations

from typing import Any, NamedTuple

NUMBER = (int, float)

_NAMES = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
_NAMES |= {dict: "an object", list: "a list", type(None): "null"}


class Values(NamedTuple):
    """An object whose values all have one shape."""

    shape: Any


class Maybe(NamedTuple):
    """Null, or a value of the shape."""

    shape: Any


def check_shape(value: Any, shape: Any, where: str) -> None:
    """Return if `value` has `shape`; otherwise raise ValueError naming the place inside `where`.

    >>> check_shape({"step": 1, "loss": None}, {"step": int, "loss": Maybe(NUMBER)}, "metrics.jsonl, line 1")
    >>> check_shape({"step": "one"}, {"step": int}, "metrics.jsonl, line 1")
    Traceback (most recent call last):
    ...
    ValueError: metrics.jsonl, line 1, step: expected a whole number, found text; write the file again
    """
    match shape:
        case Maybe(inner):
            if value is not None:
                check_shape(value, inner, where)
        case Values(inner):
            check_shape(value, dict, where)
            for key, item in value.items():
                check_shape(item, inner, f"{where}, {key}")
        case dict():
            check_shape(value, dict, where)
            for key, inner in shape.items():
                if key not in value:
                    raise ValueError(f"{where}: expected {key!r}, found no such entry; write the file again")
                check_shape(value[key], inner, f"{where}, {key}")
        case [inner]:
            check_shape(value, list, where)
            for number, item in enumerate(value, start=1):
                check_shape(item, inner, f"{where}, item {number}")
        case _:
            _check_type(value, shape if isinstance(shape, tuple) else (shape,), where)


def _check_type(value: Any, types: tuple[type, ...], where: str) -> None:
    # Python counts True as an int; in these files it is a mistake
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = "a number" if types == NUMBER else " or ".join(_NAMES[kind] for kind in types)
        raise ValueError(f"{where}: expected {expected}, found {_NAMES[type(value)]}; write the file again")
