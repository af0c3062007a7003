"""YAML file -> overrides -> frozen typed config, and back: every problem of a config is found before any work starts.

A study states its settings as classes derived from `Config`; `load_config` fills them from a file and `--set`
overrides, and `dump_config` writes the resolved result into the run folder. Paths in a config are taken relative to
the *working directory*, not to the file, so that one command line means one set of files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from vlmalign.config_tree import complete, join, nearest
from vlmalign.config_yaml import read_yaml, write_yaml
from vlmalign.overrides import apply_override, parse_override
from vlmalign.quoting import MOST_OF_LINE, shown

#: problems that the error of a config lists
MOST_TOLD = 40

#: marks a setting that cannot change a result beyond rounding (`studies/engine/sections.py`)
FREE = Field(json_schema_extra={"free": True})


class Config(BaseModel):
    """Base of all configs and their sections: frozen, unknown keys refused, defaults checked like given values.

    Use tuples rather than lists (a frozen config should not hold a list that can grow), and give a section that has
    several kinds a tag: `objective: Sft | Grpo = Field(discriminator="kind")` with `kind: Literal["sft"] = "sft"`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, populate_by_name=True)


class ConfigError(ValueError):
    """The problems of one config, one a line, the first `MOST_TOLD` of them; `problems` has all."""

    def __init__(self, source: str, problems: Sequence[str]):
        self.problems = tuple("\n".join(shown(line, MOST_OF_LINE) for line in each.split("\n")) for each in problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        more = [f"  and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else []
        told = [f"  {problem}" for problem in self.problems[:MOST_TOLD]]
        super().__init__("\n".join([f"{shown(source, MOST_OF_LINE)}: {count}", *told, *more]))


AnyConfig = TypeVar("AnyConfig", bound=Config)


def load_config(cls: type[AnyConfig], path: str | Path, overrides: Iterable[str] = ()) -> AnyConfig:
    """The config of class `cls` in the YAML file at `path`, with overrides such as "sft.steps=10" applied in order.

    Values are typed strictly: nothing is converted except an integer where a number is wanted and what YAML has no
    word for (paths, tuples). A section given in part keeps the defaults of the class that contains it. Raises
    ConfigError with all problems: unknown keys with their nearest known key, wrong types with path, expected and
    found, missing keys, overrides that lead nowhere.
    """
    try:
        data = read_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(str(path), [f"no such file; the working directory is {Path.cwd()}"]) from error
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), [str(error)]) from error
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(str(path), [f"expected keys and values at the top, found {_found(data)}"])
    problems: list[str] = []
    for text in overrides:
        try:
            apply_override(data, *parse_override(text))
        except ValueError as error:
            problems.append(str(error))
    data = complete(cls, data, PydanticUndefined, (), problems)
    try:
        # JSON mode is the strict mode that still takes a list for a tuple and text for a path.
        config = cls.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += _describe(error.errors(include_url=False), data)
    except TypeError as error:
        problems.append(f"only text, numbers, true, false, null, lists and sections can be given: {error}")
    if problems:
        raise ConfigError(str(path), problems)
    return config


def dump_config(config: Config) -> str:
    """YAML text of every setting, defaults included, from which `load_config` makes an equal config."""
    return write_yaml(config.model_dump(mode="json", by_alias=True))


_EXPECTED = {  # pydantic's error type -> what YAML calls the thing it wants
    "bool_type": "true or false",
    "int_type": "an integer",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
}
_FOUND = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a section",
}


def _describe(errors: Iterable[ErrorDetails], data: Any) -> list[str]:
    """One line a place: path, expected, found. Alternatives of a union that failed at one place are joined by "or"."""
    wanted: dict[tuple[str, str], list[str]] = {}  # (start of the line, its end) -> what goes between, in field order
    for error in errors:
        path, kind, message = join(_place(error, data)) or "(top)", error["type"], error["msg"]
        if kind == "missing":
            wanted[f"{path}: required, but not given", ""] = []
        elif kind == "extra_forbidden":
            wanted[f"{path}: unknown key", ""] = []
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            wanted[_describe_tag(path, error), ""] = []
        elif kind in _EXPECTED or message.startswith("Input should be "):
            found = _found(error["input"])
            if kind == "literal_error" and isinstance(error["input"], str):
                close = nearest(error["input"], re.findall(r"'([^']*)'", error["ctx"]["expected"]))
                found += f"; the nearest is {close!r}" if close else ""
            alternatives = wanted.setdefault((f"{path}: expected ", f", found {found}"), [])
            alternatives.append(_EXPECTED.get(kind, message.removeprefix("Input should be ")))
        else:
            wanted[f"{path}: {message.removeprefix('Value error, ')}", ""] = []
    return [start + " or ".join(dict.fromkeys(middle)) + end for (start, end), middle in wanted.items()]


def _describe_tag(path: str, error: ErrorDetails) -> str:
    tag = error["ctx"]["discriminator"].strip("'")
    if error["type"] == "union_tag_not_found":
        return f"{path}.{tag}: required, but not given: it says which kind of section this is"
    given, known = error["ctx"]["tag"], error["ctx"]["expected_tags"]
    close = nearest(given, re.findall(r"'([^']*)'", known))
    return f"{path}.{tag}: expected one of {known}, found {given!r}; the nearest is {close!r}"


def _place(error: ErrorDetails, data: Any) -> list[str | int]:
    """The path a user can find: pydantic's location without the labels it adds for the members of a union."""
    path: list[str | int] = []
    for part in error["loc"]:
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int)
        if inside:
            path.append(part)
            data = data[part]
    if error["type"] == "missing":
        path.append(error["loc"][-1])
    return path


def _found(value: Any) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({_FOUND.get(type(value), type(value).__name__)})"
