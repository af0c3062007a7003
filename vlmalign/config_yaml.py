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


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own class attribute, emptied)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, yaml.Mark] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            key.tag = "tag:yaml.org,2002:str"  # keys name fields: `1:` and `"1":` are one key, `null:` is a word
            first = seen.setdefault(key.value, key.start_mark)
            if first is not key.start_mark:
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"key {key.value!r} is given twice, first on line {first.line + 1}",
                    key.start_mark,
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unicode's own line breaks survive only as escapes; PyYAML would write them raw and read them back as spaces.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029\ufeff") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)

for _tag, _pattern, _first in _PLAIN_WORDS:
    for _dialect in (
        _Loader,
        _Dumper,
    ):  # the writer also keeps YAML 1.1's words, so it quotes what either would read
        _dialect.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$", re.ASCII), _first)


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
