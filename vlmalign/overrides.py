"""Command-line overrides of a config, `--set a.b=c`, applied to the file's plain data before it is typed.

The path is keys joined by dots; in a list of the file, a number is an index from 0. The value is YAML, so `1e-4`,
`true`, `[1, 2]` and `{kind: sft}` mean what they mean in the file, and nothing after `=` means null.
"""

from __future__ import annotations

from typing import Any

from vlmalign.config_yaml import read_yaml


def parse_override(text: str) -> tuple[tuple[str, ...], Any]:
    """The path and the value of one override; raises ValueError when it has no `=` or no key.

    >>> parse_override("sft.learning_rate=1e-4")
    (('sft', 'learning_rate'), 0.0001)
    """
    dotted, equals, value = text.partition("=")
    path = tuple(part.strip() for part in dotted.split("."))
    if not equals or not all(path):
        raise ValueError(f"--set {text}: expected path=value, such as sft.learning_rate=1e-4")
    try:
        return path, read_yaml(value)
    except ValueError as error:
        raise ValueError(f"--set {text}: the value is {error}") from error


def apply_override(data: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Put `value` at `path` of `data`, in place; sections that are absent or null are made on the way.

    Whether the keys exist is the typed config's question. Raises ValueError where a list index is out of range or
    the path leads through something that is neither a section nor a list.
    """
    node: Any = data
    for depth, part in enumerate(path):
        here = ".".join(path[:depth])
        key: str | int = part
        if isinstance(node, list):
            if not part.isdecimal() or int(part) >= len(node):
                raise ValueError(
                    f"--set {'.'.join(path)}: {here} is a list of {len(node)}, so an index from 0 to {len(node) - 1} "
                    f"must follow, found {part!r}; to replace the whole list set {here}=[...]"
                )
            key = int(part)
        elif not isinstance(node, dict):
            raise ValueError(f"--set {'.'.join(path)}: {here} is {node!r} in the file, not a section")
        if depth == len(path) - 1:
            node[key] = value
        elif isinstance(node, list):
            node = node[key]
        else:
            if node.get(key) is None:
                node[key] = {}
            node = node[key]
