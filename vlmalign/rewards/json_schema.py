"""JSON Schema, the subset that structured answers need: saying what a value violates.

Keywords: type, enum, properties, required, additionalProperties (true or false), items (one schema), minItems,
maxItems, minLength, maxLength, minimum, maximum; title and description are ignored. Their meaning is that of JSON
Schema draft 2020-12. Any other keyword is refused: a constraint that is silently not checked would be rewarded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from vlmalign.quoting import quoted, shown

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_KEYWORDS = {"type", "enum", "properties", "required", "additionalProperties", "items", "minItems", "maxItems"}
_KEYWORDS |= {"minLength", "maxLength", "minimum", "maximum", "title", "description"}
_BOUNDS = {"minItems": list, "maxItems": list, "minLength": str, "maxLength": str}


def check_schema(schema: Any, place: str = "schema") -> None:
    """Raises ValueError naming what in a schema this subset does not know."""
    if not isinstance(schema, Mapping):
        raise ValueError(f"{place}: expected an object of keywords, found {quoted(schema)}")
    if unknown := sorted(set(schema) - _KEYWORDS):
        raise ValueError(
            f"{place}: expected keywords among {sorted(_KEYWORDS)}, found {quoted(unknown)}; leave them out"
        )
    kinds = schema.get("type", ())
    for kind in kinds if isinstance(kinds, list | tuple) else (kinds,):
        if not isinstance(kind, str) or kind not in _TYPES:
            raise ValueError(f"{place}: type must be one of {sorted(_TYPES)}, found {quoted(kind)}")
    for name in ("minItems", "maxItems", "minLength", "maxLength", "minimum", "maximum"):
        if name in schema and (isinstance(schema[name], bool) or not isinstance(schema[name], int | float)):
            raise ValueError(f"{place}: {name} must be a number, found {quoted(schema[name])}")
    for name, kinds in (
        ("enum", list | tuple),
        ("required", list | tuple),
        ("properties", Mapping),
        ("items", Mapping),
    ):
        if name in schema and not isinstance(schema[name], kinds):
            raise ValueError(
                f"{place}: {name} must not be a {type(schema[name]).__name__}, found {quoted(schema[name])}"
            )
    if wrong := [name for name in schema.get("required", ()) if not isinstance(name, str)]:
        raise ValueError(f"{place}: required must hold names of properties, found {quoted(wrong[0])}")
    if not isinstance(schema.get("additionalProperties", True), bool):
        raise ValueError(f"{place}: additionalProperties must be true or false; schemas for them are not supported")
    for name, inner in schema.get("properties", {}).items():
        check_schema(inner, f"{place}.{shown(name)}")
    if "items" in schema:
        check_schema(schema["items"], f"{place}[]")


def violations(value: Any, schema: Mapping[str, Any], place: str = "$") -> list[str]:
    """What a value violates, each with its place; [] when it conforms.

    >>> violations({"dose": 3}, {"type": "object", "required": ["drug"], "properties": {"dose": {"maximum": 2}}})
    ['$.drug is missing', '$.dose is above 2']
    """
    found = []
    kinds = _kinds(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        return [f"{place} is not {' or '.join(kinds)}"]
    if "enum" in schema and not any(_same(value, option) for option in schema["enum"]):
        found.append(f"{place} is not one of the {len(schema['enum'])} values allowed")
    for name, kind in _BOUNDS.items():
        if name in schema and isinstance(value, kind):
            wrong = len(value) < schema[name] if name.startswith("min") else len(value) > schema[name]
            found += [f"{place} violates {name} {schema[name]}"] if wrong else []
    if _is(value, "number"):
        found += [f"{place} is below {schema['minimum']}"] if value < schema.get("minimum", -math.inf) else []
        found += [f"{place} is above {schema['maximum']}"] if value > schema.get("maximum", math.inf) else []
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        found += [f"{place}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        if not schema.get("additionalProperties", True):
            found += [f"{place} has a property that is not allowed" for name in value if name not in properties]
        for name, inner in properties.items():
            if name in value:
                found += violations(value[name], inner, f"{place}.{name}")
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += violations(item, schema["items"], f"{place}[{index}]")
    return found


def _kinds(schema: Mapping[str, Any]) -> tuple[Any, ...]:
    kinds = schema.get("type", ())
    return (kinds,) if isinstance(kinds, str) else tuple(kinds)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):  # which Python takes for an int
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()  # 1.0 is an integer in JSON Schema
    return isinstance(value, _TYPES[kind])


def _same(first: Any, second: Any) -> bool:
    """Equality of JSON values: 1 equals 1.0, and true is not 1."""
    if isinstance(first, list) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_same, first, second))
    if isinstance(first, dict) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)
    return isinstance(first, bool) == isinstance(second, bool) and first == second
