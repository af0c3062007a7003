"""A chat template, rendered as transformers renders it, with what a template from elsewhere may not do.

A template is a program that came with a checkpoint. It runs in Jinja's immutable sandbox, where it reaches nothing but
the conversation; what an operation makes is bounded, and so are its steps (rounds of loops, calls) and what it writes.
What else takes long is found by trying every template first in a process of its own, with limits on time and memory. It
is told the time that it is given, not the clock's: the same conversation gives the same text on every day.

Run as a script this module is that process.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import suppress
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from itertools import islice
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

#: characters or items that one operation of a template may make, and characters that it may write
MOST = 10_000_000
#: rounds of loops, and calls, that a template may make for one conversation
MOST_STEPS = 200_000
#: bits of a number
MOST_BITS = 4096
#: seconds of processor time, seconds on the clock, and bytes that a template may take in its trial
TRIAL_CPU_S, TRIAL_S, TRIAL_BYTES = 10, 60.0, 2**30
#: the names that the thoughts before an answer go by, the first that is there being written under the others' too
REASONING = ("reasoning_content", "thinking", "reasoning")
#: conversations that a template is tried with; what it refuses is no fault
TRIALS: Sequence[Sequence[Mapping[str, Any]]] = (
    [{"role": "user", "content": "Is it?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}],
    [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}],
)  # fmt: skip

#: widths in `%` formats and in the fields of str.format, which may also take theirs from an argument
_WIDE = re.compile(r"%[^a-zA-Z%]*(\d{6,}|\*)")
_WIDE_FIELD = re.compile(r"\{[^{}]*:[^{}]*(\d{6,}|\{)")


#: where a template says itself what the model is to write
MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")


def reads_the_clock(source: str) -> bool:
    """Whether a chat template writes the date or the time: elsewhere it gives other tokens on another day.

    >>> reads_the_clock("{{ strftime_now('%d %b %Y') }}"), reads_the_clock("{{ messages[0].content }}")
    (True, False)
    """
    return "strftime_now" in source


class Template:
    """A compiled chat template; `special` are the tokens it may name (bos_token, ...), `now` the time it is told."""

    def __init__(self, source: str, special: Mapping[str, str], now: datetime):
        self._compiled = _environment().from_string(source)
        self._special, self._now = dict(special), now
        self.has_markers = MARKER.search(source) is not None

    def render(self, messages: Sequence[Mapping[str, Any]], *, continues: bool) -> str:
        """The conversation as text, with the header of the next answer when it `continues`.

        Raises:
            TemplateError, TypeError, OverflowError: when the template refuses it, or goes beyond what it may do.
        """
        return self.marked(messages, continues=continues)[0]

    def marked(self, messages: Sequence[Mapping[str, Any]], *, continues: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the characters [start, end) of it that stand between `{% generation %}` markers, in order."""
        mark = secrets.token_hex(8)  # no text can hold it
        opening, closing = f"\0{mark}<", f"\0{mark}>"
        written, length = [], 0
        _steps.set(0)
        for piece in self._compiled.generate(
            messages=[_with_reasoning(message) for message in messages],
            tools=None,
            documents=None,
            add_generation_prompt=continues,
            strftime_now=self._strftime,
            generation_marks=(opening, closing),
            **self._special,
        ):
            written.append(piece)
            length += len(piece)
            if length > MOST:
                raise TemplateError(f"it writes more than {MOST} characters")
        return _unmarked("".join(written), opening, closing)

    def _strftime(self, form: str) -> str:
        return self._now.strftime(form)


@lru_cache(maxsize=64)
def check_template(source: str) -> None:
    """Try a template in a process of its own; once for each.

    Raises:
        ValueError: when it does not end in time, or takes too much memory.
    """
    # As a script, and isolated: nothing but Jinja is imported, so that the limit on memory is the template's own.
    command = [sys.executable, "-I", __file__]
    try:
        done = subprocess.run(
            command, input=source.encode("utf-8", "replace"), capture_output=True, timeout=TRIAL_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"the chat template does not end within {TRIAL_S:g} s; use one that you trust") from None
    if done.returncode > 0 and b"MemoryError" not in done.stderr:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"the chat template could not be tried ({''.join(last)}); use one that you trust")
    if done.returncode:
        raise ValueError(
            f"the chat template takes more than {TRIAL_CPU_S} s or {TRIAL_BYTES >> 20} MiB to write a conversation of three "
            "turns; use one that you trust"
        )


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    thoughts = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if thoughts is None:
        return dict(message)
    return {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _unmarked(text: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and where they stood."""
    pieces, spans, starts, length = [], [], [], 0
    for piece in re.split(f"({re.escape(opening)}|{re.escape(closing)})", text):
        if piece == opening:
            starts.append(length)
        elif piece == closing:
            spans.append((starts.pop(), length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model is to write."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's name for it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = jinja2.nodes.Name("generation_marks", "load")
        return jinja2.nodes.CallBlock(self.call_method("_between", [marks]), [], [], body).set_lineno(line)

    def _between(self, marks: tuple[str, str], caller: Callable[[], str]) -> str:
        return f"{marks[0]}{caller()}{marks[1]}"


class _Namespace(Namespace):
    """One whose attributes are the template's own: none of Python's."""

    def __init__(*args: Any, **values: Any) -> None:
        own, *rest = args
        found = dict(*rest, **values)
        for name in found:
            _refuse_private(name)
        Namespace.__init__(own, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a template may not set {name!r}")


class _Countable(NodeTransformer):
    """Loops go over what `_counted` counts, and `a ~ b` is joined where its length can be bounded."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "_counted", [], [], None, None, lineno=node.lineno)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno)
        return nodes.Filter(parts, "_joined", [], [], None, None, lineno=node.lineno)


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, in which no single operation makes more than `MOST` characters or items, and a conversation takes no
    more than `MOST_STEPS` steps."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Countable().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for many, times in ((left, right), (right, left)):
                if isinstance(many, str | bytes | list | tuple) and isinstance(times, int):
                    _refuse_above(len(many) * times)
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > MOST_BITS:
                raise SecurityError("a template's numbers have a bound")
        elif operator == "**":
            if isinstance(left, int) and isinstance(right, int) and left.bit_length() * abs(right) > MOST_BITS:
                raise SecurityError("a template's numbers have a bound")
        elif operator == "+":
            if isinstance(left, Sized) and isinstance(right, Sized):
                _refuse_above(len(left) + len(right))
        elif isinstance(left, str) and _WIDE.search(left):
            raise SecurityError("a template's formats have a bound")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Any:
        made = super().wrap_str_format(value)
        if made is not None and _WIDE_FIELD.search(value.__self__):
            raise SecurityError("a template's formats have a bound")
        return made

    def call(self, context: Any, called: Any, *args: Any, **named: Any) -> Any:
        _count(1)
        text = getattr(called, "__self__", None)
        if isinstance(text, str):
            if called.__name__ in ("replace", "join", "translate"):
                _refuse_longer(text, *args, *named.values())
            for value in (*args, *named.values()):  # center, ljust, zfill, expandtabs, ...
                if isinstance(value, int):
                    _refuse_above(value)
        return super().call(context, called, *args, **named)


def _refuse_above(size: int) -> None:
    if size > MOST:
        raise SecurityError(f"no operation of a template may make more than {MOST} characters or items")


def _refuse_longer(*values: Any) -> None:
    """Refuse what could become too long where each character of one value is replaced, or each item joined, by another."""
    texts = [value for value in values if isinstance(value, Sized)]
    items = [item for value in texts if isinstance(value, list | tuple) for item in value if isinstance(item, Sized)]
    _refuse_above(math.prod(sorted(1 + len(text) for text in texts)[-2:]) + sum(map(len, items)))


#: steps of the conversation that is being written
_steps: ContextVar[int] = ContextVar("steps of a template", default=0)


def _count(steps: int) -> None:
    _steps.set(_steps.get() + steps)
    if _steps.get() > MOST_STEPS:
        raise SecurityError(f"a template may take no more than {MOST_STEPS} steps for a conversation")


def _counted(items: Any) -> Any:
    """What a loop goes over, its rounds counted before it begins."""
    if not isinstance(items, Sized):
        items = list(islice(items, MOST_STEPS + 1))
    _count(len(items))
    return items


def _joined(parts: Sequence[Any]) -> str:
    texts = [str(part) for part in parts]
    _refuse_above(sum(map(len, texts)))
    return "".join(texts)


def _bounded_filter(made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that makes text longer, with a bound on what it makes."""

    @wraps(made)  # with it what Jinja is to pass to it
    def bounded(*args: Any, **named: Any) -> Any:
        values = (*args, *named.values())
        _refuse_longer(*values)
        for number in values:
            if isinstance(number, int):
                _refuse_above(number)
        return made(*args, **named)

    return bounded


def _format(value: str, *args: Any, **named: Any) -> str:
    if _WIDE.search(value):
        raise SecurityError("a template's formats have a bound")
    return value % (named or args)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML's escapes, which Jinja's own filter writes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(reason: str) -> None:
    raise TemplateError(reason)


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    found = _Bounded(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    found.filters |= {"tojson": _to_json, "format": _format, "_counted": _counted, "_joined": _joined}
    for name in ("center", "indent", "join", "replace"):
        found.filters[name] = _bounded_filter(found.filters[name])
    for name in ("lipsum", "cycler", "joiner"):
        found.globals.pop(name, None)
    found.globals |= {"raise_exception": _refuse, "namespace": _Namespace}
    return found


def _trial() -> None:
    """Render the conversations of `TRIALS` with the template on standard input, under limits."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (TRIAL_CPU_S, TRIAL_CPU_S + 1))
    with suppress(ValueError):  # a system that cannot limit it
        resource.setrlimit(resource.RLIMIT_AS, (TRIAL_BYTES, TRIAL_BYTES))
    source = sys.stdin.buffer.read().decode()
    tokens = {name: f"<{name}>" for name in ("bos_token", "eos_token", "unk_token", "pad_token", "image_token")}
    try:
        template = Template(source, tokens, datetime(2000, 1, 1))
    except TemplateError:  # said where it is used
        return
    for messages in TRIALS:
        for continues in (False, True):
            try:
                template.render(messages, continues=continues)
            except MemoryError:
                raise
            except SecurityError:  # bounded there as well
                return
            except Exception:  # what a template refuses, or misses here, is said where it is used
                continue


if __name__ == "__main__":
    _trial()
