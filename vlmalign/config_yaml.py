"""YAML as configs use it: read without surprises, and written so that it reads back exactly.

Plain words follow YAML 1.2: only `true` and `false` are booleans (a label `no` stays text), `1e-4` is a number,
`00012` and dates stay text. A key given twice in one section is an error, because the later one would silently win.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# (tag, what a plain word must match in full, the characters it can begin with; "" is the empty value)
_PLAIN_WORDS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


#: values that a text may stand for when its aliases are written out: a few lines of them can mean billions
MOST_VALUES = 1_000_000
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute, emptied)
    # Nothing but what JSON has: no dates, bytes or sets, also where a tag asks for them.
    yaml_constructors = {  # noqa: RUF012
        tag: made
        for tag, made in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def construct_document(self, node: yaml.Node) -> Any:
        _check_aliases(node, {})
        return super().construct_document(node)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError):  # `!!int x`, `!!bool x`, a number of thousands of digits
            kind = node.tag.removeprefix(_TAG)
            raise yaml.constructor.ConstructorError(None, None, f"this is no {kind}", node.start_mark) from None

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.tag == f"{_TAG}merge":
                continue
            key.tag = f"{_TAG}str"  # keys name fields: `1:` and `"1":` are one key, `null:` is a word
            first = seen.setdefault(key.value, key.start_mark)
            if first is not key.start_mark:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key.value!r} is given twice, first on line {first.line + 1}",
                    key.start_mark,
                )
        return super().construct_mapping(node, deep)


def _check_aliases(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """How many values a node stands for; raises ConstructorError for one that holds itself, and for too many."""
    if (size := sizes.get(id(node), 0)) is None:
        raise yaml.constructor.ConstructorError(None, None, "a value holds itself, by an alias", node.start_mark)
    if not size:
        sizes[id(node)] = None
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = inner if isinstance(node, yaml.CollectionNode) else ()
        sizes[id(node)] = size = 1 + sum(_check_aliases(part, sizes) for part in parts)
        if size > MOST_VALUES:
            problem = f"its aliases stand for more than {MOST_VALUES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return size


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unicode's own line breaks survive only as escapes; PyYAML would write them raw and read them back as spaces.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar(f"{_TAG}str", text, style=style)


_Dumper.add_representer(str, _write_text)

for _tag, _pattern, _first in _PLAIN_WORDS:
    for _dialect in (
        _Loader,
        _Dumper,
    ):  # the writer also keeps YAML 1.1's words, so it quotes what either would read
        _dialect.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"^(?:{_pattern})$", re.ASCII), _first)


def read_yaml(text: str) -> Any:
    """Plain dicts, lists and scalars of a YAML text.

    Raises ValueError, with line and column, on anything that is not one well-formed document.

    >>> read_yaml("lr: 1e-4\\nlabel: no\\nid: 007")
    {'lr': 0.0001, 'label': 'no', 'id': '007'}
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise ValueError("not a YAML text that can be read: it is nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ValueError(f"not valid YAML: {error.problem or error.context}{where}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from error


def write_yaml(data: Any) -> str:
    """YAML text which `read_yaml` turns back into equal data; keys keep their order.

    >>> print(write_yaml({"name": "1e-4", "lr": 1e-4, "sizes": [1, 2]}), end="")
    name: '1e-4'
    lr: 0.0001
    sizes: [1, 2]
    """
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
