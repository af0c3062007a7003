"""Valid files, damaged: by their format (cells, values, chunks, headers) and byte by byte.

`damaged(content, name)` draws the bytes of a file that was `content`. All is drawn from hypothesis, so that a failing
case shrinks and is found again under the same seed.
"""

from __future__ import annotations

import copy
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy], Any]

#: values that Python's own writer does not write, by the text that stands for them
RAW = {
    "@deep400": "[" * 400 + "]" * 400,
    "@deep900": '{"a":' * 900 + "1" + "}" * 900,
    "@deep": "[" * 100_000 + "]" * 100_000,
    "@digits": "9" * 5000,
    "@exponent": "1e999",
}
TEXTS = (
    "", " ", "\0", "\ufeff", "\u202e\u2066", "\x1b[31m\x1b]0;x\x07", "\u2028\x85", "\ud800", "é", "x" * 3000, "y" * 200_000,
    "..", "../x.png", "/x.png", "a/b\0c", "n" * 300, "[/bold]", "[bold]", "nan", "NaN", "-1", "1e999", "9" * 400, "|", ",",
    ";", '"', "'", "{", "{{ x", "{x}", "<image>", "%s%n", "\\", "true", "null", "~", "user", "assistant", "system", "text",
    "image", "https://x/y", "\r", "\n", "a\nb", "\t", "\U0001f600", "e\u0301" * 50, "\u0661",
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 2, 2**31, 2**63, -(2**64), 10**400, 0.0, -0.0, 0.5, 1e308, -1e-320, float("nan"),
    float("inf"), -float("inf"), [], {}, [[]], [None], {"": None}, [1, "a"], {"a": {"b": []}},
    {"bytes": None, "path": "x.png"}, {"type": "image"}, *RAW,
)  # fmt: skip
FRAGMENTS = (
    b"\0", b"\xef\xbb\xbf", b"\xff\xfe", b"\xff", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\x1b[2J", b"\r\n", b"\r", b"\n",
    b"\n\n", b'"', b"'", b",", b"{", b"}", b"[", b"]", b":", b"NaN", b"Infinity", b"1e999", b"-", b"9" * 5000,
    b"[" * 5000, b'{"a":' * 2000, b"\\ud800", b"\\u0000", b"null", b"true", b"\t", b" ", b"a" * 140_000, b"\0" * 64,
    b"version https://git-lfs.github.com/spec/v1\n",
)  # fmt: skip
_LAUGHS = "\n".join(
    f"{name}: &{name} [{', '.join([f'*{before}' if before else 'x'] * 9)}]"
    for before, name in zip(["", *"abcdefg"], "abcdefgh", strict=True)
)
YAML = (
    b"&a ", b"*a", b"&a [*a]", b"<<: *a\n", b"<<: 1\n", b"!!python/object:os.system x", b"!!binary x", b"!!int x", b"!!float x",
    b"!!timestamp 2001-99-99", b"!!set {a}", b"!!omap 1", b"!!pairs [a]", b"!!bool x", b"!!null x", b"!x y", b"---\n", b"...\n",
    b"%YAML 9.9\n", b"%TAG ! x\n", b"? ", b"? [a]\n: b\n", b"- ", b"|\n", b">\n", b"@", b"`", b"2001-99-99", b"0x", b"1_", b"._",
    _LAUGHS.encode(),
)  # fmt: skip
TEMPLATE = (
    b"{{", b"}}", b"{%", b"%}", b"{#", b"{{ x }}", b"{% endfor %}", b"{% if x %}", b"{{ messages }}", b"{{ 1 // 0 }}", b"{{ 'a' * 10 ** 9 }}",
    b"{{ 2 ** 9999999 }}", b"{{ [1][9] }}", b"{{ messages | map('x') }}", b"{{ raise_exception('\x1b[31m') }}", b"{{ ''.__class__ }}",
    b"{{ messages | tojson }}", b"{% set messages = 1 %}", b"{{ strftime_now(1) }}", b"{{ cycler }}", b"{{ '%9999999d' % 1 }}", b"{{ 'a' | int + 'b' }}",
    b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", b"{% generation %}", b"{% endgeneration %}", b"{% break %}", b"{% include 'x' %}",
    b"{{ '\\ud800' }}", b"{{ messages[0]['content'] | center(99999999) }}", b"{{ namespace(__class__=1) }}",
)  # fmt: skip


def damaged(content: bytes, name: str) -> st.SearchStrategy[bytes]:
    """The bytes of a file called `name` that was `content`: damaged in its format, byte by byte, or anything at all."""
    by_format = _BY_ENDING.get(name.rpartition(".")[2], _as_bytes)
    more = {"yaml": YAML, "jinja": TEMPLATE}.get(name.rpartition(".")[2], ())

    @st.composite
    def draw_file(draw: Draw) -> bytes:
        way = draw(st.integers(0, 9))
        if way == 9:
            return draw(st.one_of(st.binary(max_size=300), st.text(max_size=200).map(_utf8)))
        found = by_format(draw, content) if way < 6 else content
        return _edited(draw, found, FRAGMENTS + more) if way > 4 else found

    return draw_file()


def texts(valid: str) -> st.SearchStrategy[str]:
    """A text that was `valid`, damaged; it may hold halves of surrogate pairs."""
    return damaged(valid.encode(), "x.txt").map(
        lambda data: data.decode("utf-8", "surrogatepass" if data.isascii() else "replace")
    )


def values(valid: Any) -> st.SearchStrategy[Any]:
    """A JSON value that was `valid`, with some of its parts exchanged; the texts of RAW stand for themselves."""

    @st.composite
    def draw_value(draw: Draw) -> Any:
        return _changed(draw, valid)

    return draw_value()


def as_json(value: Any, *, ascii_only: bool = True) -> bytes:
    """JSON of a value, with what stands for the texts of RAW; `@twice` is written as another key of its object."""
    text = json.dumps(value, ensure_ascii=ascii_only)
    for name, raw in RAW.items():
        text = text.replace(f'"{name}"', raw)
    if '"@twice"' in text and isinstance(value, dict):
        text = text.replace('"@twice"', json.dumps(next(iter(value))))
    return _utf8(text)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _value(draw: Draw) -> Any:
    kind = draw(st.integers(0, 3))
    if kind == 3:
        return draw(st.one_of(st.text(max_size=8), st.integers(), st.floats()))
    return copy.deepcopy(draw(st.sampled_from(TEXTS if kind == 2 else VALUES)))  # it may be changed further


def _changed(draw: Draw, valid: Any) -> Any:
    """A copy with one to three of its parts exchanged, left out, put in twice, renamed, wrapped or moved."""
    root = [copy.deepcopy(valid)]
    for _ in range(draw(st.integers(1, 3))):
        parent, key = _place(draw, root)
        act = draw(st.integers(0, 7))
        if act <= 2:
            parent[key] = _value(draw)
        elif act == 3 and parent is not root:
            del parent[key]
        elif act == 4 and isinstance(parent, list):
            parent.insert(draw(st.integers(0, len(parent))), _value(draw) if draw(st.booleans()) else parent[key])
        elif act == 4:
            parent[draw(st.sampled_from(("@twice", *TEXTS)))] = parent[key]
        elif act == 5:
            parent[key] = [parent[key]] if draw(st.booleans()) else {"a": parent[key]}
        elif act == 6:
            other, place = _place(draw, root)
            parent[key] = copy.deepcopy(other[place])
        elif isinstance(parent[key], dict):
            parent[key][draw(st.sampled_from(TEXTS))] = _value(draw)
        else:
            parent[key] = _value(draw)
    return root[0]


def _place(draw: Draw, root: list[Any]) -> tuple[Any, Any]:
    """A container within, and a key of it."""
    parent: Any = root
    key: Any = 0
    while isinstance(parent[key], dict | list) and parent[key] and draw(st.integers(0, 6)):
        parent = parent[key]
        key = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
    return parent, key


def _edited(draw: Draw, data: bytes, fragments: tuple[bytes, ...]) -> bytes:
    """One to four edits of the bytes."""
    for _ in range(draw(st.integers(1, 4))):
        act, at = draw(st.integers(0, 9)), draw(st.integers(0, max(0, len(data) - 1)))
        end = min(len(data), at + draw(st.sampled_from((1, 1, 2, 4, 16, 200))))
        if act == 0:
            data = data[:at] + bytes([draw(st.integers(0, 255))]) + data[at + 1 :]
        elif act == 1:
            data = data[:at] + data[end:]
        elif act == 2:
            data = data[:at]
        elif act <= 5:
            data = data[:at] + draw(st.sampled_from(fragments)) + data[at:]
        elif act == 6:
            data = data[:end] + data[at:]
        elif act == 7:
            lines = data.split(b"\n")
            one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
            lines.insert(other, lines[one])
            data = b"\n".join(lines)
        elif act == 8:
            data = data.replace(b"\n", draw(st.sampled_from((b"\r\n", b"\r", b"\n\n", b"\0"))))
        else:
            data = _recoded(draw, data)
    return data


def _recoded(draw: Draw, data: bytes) -> bytes:
    coding = draw(st.sampled_from(("utf-16", "utf-32-le", "utf-8-sig", "latin-1", "gzip")))
    return (
        gzip.compress(data, mtime=0) if coding == "gzip" else data.decode("utf-8", "replace").encode(coding, "replace")
    )


def _as_bytes(draw: Draw, data: bytes) -> bytes:
    return _edited(draw, data, FRAGMENTS)


def _as_json_file(draw: Draw, data: bytes) -> bytes:
    return as_json(_changed(draw, _json(data)), ascii_only=draw(st.booleans()))


def _as_lines(draw: Draw, data: bytes) -> bytes:
    lines = [line for line in data.split(b"\n") if line]
    if not lines:
        return _as_bytes(draw, data)
    at = draw(st.integers(0, len(lines) - 1))
    act = draw(st.integers(0, 9))
    if act < 8:
        lines[at] = as_json(_changed(draw, _json(lines[at])), ascii_only=draw(st.booleans()))
    elif act == 8:
        lines.insert(draw(st.integers(0, len(lines))), lines[at])
    else:
        del lines[at]
    return b"\n".join([*lines, b""])


def _as_cells(draw: Draw, data: bytes) -> bytes:
    rows = [list(row) for row in _cells(data)]
    for _ in range(draw(st.integers(1, 3))):
        act, at = draw(st.integers(0, 8)), draw(st.integers(0, len(rows) - 1))
        row = rows[at]
        column = draw(st.integers(0, max(0, len(row) - 1)))
        if act <= 3 and row:
            row[column] = draw(st.one_of(st.sampled_from(TEXTS), st.text(max_size=6)))
        elif act == 4 and row:
            other = rows[draw(st.integers(0, len(rows) - 1))]
            row[column] = other[min(column, len(other) - 1)] if other else ""
        elif act == 5 and row:
            del row[column]
        elif act == 6:
            rows.insert(at, list(row))
        elif act == 7:
            for each in rows:  # a whole column, once more or gone
                each[column : column + 1] = each[column : column + 1] * 2 if draw(st.booleans()) else []
        elif len(rows) > 1:
            del rows[at]
    written = io.StringIO()
    csv.writer(written, lineterminator=draw(st.sampled_from(("\n", "\r\n")))).writerows(rows)
    return _utf8(written.getvalue())


def _as_packed_cells(draw: Draw, data: bytes) -> bytes:
    if draw(st.integers(0, 3)) == 0:
        return _as_bytes(draw, data)
    return gzip.compress(_as_cells(draw, gzip.decompress(data)), 1, mtime=0)


def _as_yaml(draw: Draw, data: bytes) -> bytes:
    # JSON is YAML, comments apart.
    return as_json(_changed(draw, _yaml(data)), ascii_only=draw(st.booleans()))


def _as_tensors(draw: Draw, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    head, rest = data[8 : 8 + size], data[8 + size :]
    act = draw(st.integers(0, 4))
    if act <= 2:
        head = as_json(_changed(draw, _json(head)), ascii_only=draw(st.booleans()))
    elif act == 3:
        head = _edited(draw, head, FRAGMENTS)
    else:  # numbers that are none
        at = draw(st.integers(0, max(0, len(rest) - 4)))
        rest = (
            rest[:at] + draw(st.sampled_from((b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 8))) + rest[at + 4 :]
        )
    length = draw(st.sampled_from((len(head), len(head), len(head), 2**62, 0, len(head) + 1)))
    return length.to_bytes(8, "little") + head + rest


def _as_png(draw: Draw, data: bytes) -> bytes:
    """Chunks exchanged, with their checksums right."""
    chunks, place = [], 8
    while place + 8 <= len(data):
        size = int.from_bytes(data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    at = draw(st.integers(0, len(chunks) - 1))
    act = draw(st.integers(0, 4))
    kind, body = chunks[at]
    if act <= 1:
        chunks[at] = kind, _edited(draw, body, FRAGMENTS)
    elif act == 2:
        chunks[at] = (
            draw(st.sampled_from((b"tRNS", b"PLTE", b"zTXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"IDAT", b"tEXt"))),
            body,
        )
    elif act == 3:
        chunks.insert(at, (kind, body))
    else:
        head = bytearray(chunks[0][1])
        if len(head) >= 13:
            head[8:10] = draw(
                st.sampled_from(
                    (b"\x08\x00", b"\x10\x00", b"\x01\x00", b"\x08\x03", b"\x10\x06", b"\x10\x04", b"\x02\x02")
                )
            )
            head[draw(st.integers(0, 12))] = draw(st.integers(0, 255))
        chunks[0] = chunks[0][0], bytes(head)
    return data[:8] + b"".join(
        len(body).to_bytes(4) + kind + body + zlib.crc32(kind + body).to_bytes(4) for kind, body in chunks
    )


def _as_parquet(draw: Draw, data: bytes) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = _changed(draw, _parquet_rows(data))
    try:
        table = pa.Table.from_pylist([row for row in rows if isinstance(row, dict)])
        written = pa.BufferOutputStream()
        pq.write_table(table, written)
    except (pa.ArrowException, TypeError, ValueError, OverflowError, AttributeError):  # no table of columns
        return _as_bytes(draw, data)
    return written.getvalue().to_pybytes()


@lru_cache(maxsize=256)
def _json(data: bytes) -> Any:
    return json.loads(data)


@lru_cache(maxsize=64)
def _yaml(data: bytes) -> Any:
    from vlmalign.config_yaml import read_yaml

    return read_yaml(data.decode())


@lru_cache(maxsize=64)
def _cells(data: bytes) -> list[list[str]]:
    return list(csv.reader(io.StringIO(data.decode(), newline="")))


@lru_cache(maxsize=16)
def _parquet_rows(data: bytes) -> list[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(data)).to_pylist()


_BY_ENDING = {
    "json": _as_json_file, "jsonl": _as_lines, "csv": _as_cells, "gz": _as_packed_cells, "yaml": _as_yaml,
    "safetensors": _as_tensors, "png": _as_png, "parquet": _as_parquet,
}  # fmt: skip
