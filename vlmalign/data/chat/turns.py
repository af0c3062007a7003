"""Where the answers stand in a conversation that a chat template has written out.

There are two ways to know. Prefix rendering: the conversation written up to an answer, and up to its end, are both
prefixes of the whole, and the answer is what lies between. Markers: some templates say so themselves, by
`{% generation %}`. Markers are used where they are, prefixes always; where the two disagree nothing is trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from vlmalign.data.chat.messages import Message
from vlmalign.data.chat.template import Template

#: roles of which templates may write the text in another form (Llama 3.1: results of tools as JSON), and the answers,
#: each of which is looked for in its own place
REWRITTEN = ("tool", "ipython", "function", "assistant")


class Answer(NamedTuple):
    """Characters of one assistant turn in the text."""

    message: int  #: index of the turn
    start: int  #: the first that the model writes
    words: int  #: where its stop token begins
    stop: int  #: behind its stop token
    end: int  #: behind the turn; most templates write a line break after the stop token


class Written(NamedTuple):
    """A conversation as text."""

    text: str
    answers: list[Answer]


def write(template: Template, messages: Sequence[Message], *, stops: Sequence[str], continues: bool) -> Written:
    """The conversation as its template writes it, with the header of the next answer when it `continues`.

    `stops` are the tokens that may end an answer.

    Raises:
        ValueError: naming the turn, when the template refuses the conversation, leaves out text of it, rewrites earlier
            turns as later ones come (no prefix is stable then), ends a turn without a stop token, or marks other text
            as the answer.
    """
    if messages[0]["role"] == "assistant":
        raise ValueError("messages[0] is an assistant turn: there is nothing it answers")
    text, spans = _render(template, messages, continues=continues)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, _ = _render(template, messages[:i], continues=True)
        whole = i + 1 == len(messages) and not continues
        after = text if whole else _render(template, messages[: i + 1], continues=False)[0]
        if not (text.startswith(before) and text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"the chat template changes earlier text when messages[{i}] is added; turns cannot be masked"
            )
        answer = _answer(i, text, len(before), len(after), stops)
        if before == _render(template, messages[:i], continues=False)[0]:
            _check_opening(message, text[answer.start : answer.words], i)
        _check_words(message, i, text[answer.start : answer.words])
        answers.append(answer)
    for i, message in enumerate(messages):
        if message["role"] not in REWRITTEN:
            _check_words(message, i, text)
    if template.has_markers:
        answers = _agreed(text, answers, _joined(spans))
    return Written(text, answers)


def _render(template: Template, messages: Sequence[Message], *, continues: bool) -> tuple[str, list[tuple[int, int]]]:
    try:
        return template.marked(messages, continues=continues)
    except (TemplateError, TypeError, OverflowError) as error:
        raise ValueError(f"the chat template refuses the conversation: {error}") from error


def _answer(i: int, text: str, start: int, end: int, stops: Sequence[str]) -> Answer:
    # The first: where a template ends the text by another stop token, the model never comes to write that one.
    found = [(place, stop) for stop in stops if (place := text.find(stop, start, end)) >= 0]
    if not found:
        raise ValueError(f"messages[{i}] renders without a stop token: the model would never learn to stop")
    words, stop = min(found)
    return Answer(i, start, words, words + len(stop), end)


def _check_words(message: Message, i: int, written: str) -> None:
    """Templates may trim a text; some leave turns of a role out, or the reasoning before an answer, without a word."""
    content = message["content"]
    parts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    if not all(part.strip() in written for part in parts):
        raise ValueError(
            f"messages[{i}] ({message['role']}): the chat template leaves out text of this turn; take the text out, "
            "or use a template that writes it"
        )
    for key, value in message.items():
        if key in ("role", "content"):
            continue
        # A template may write a value as JSON, with its characters escaped.
        missing = [text for text in _texts(value) if text.strip() and not _written(text.strip(), written)]
        if missing:
            raise ValueError(
                f"messages[{i}] ({message['role']}): the chat template writes nothing of {key!r}; take it out, or use a "
                "template that writes it"
            )


def _written(text: str, written: str) -> bool:
    return any(form in written for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in ("type", "id"):  # what kind of a call it is, and its number, which many templates leave out
                yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def _check_opening(message: Message, written: str, i: int) -> None:
    """Some formats have no header (the answer follows at once); a template that forgets it makes it part of the answer."""
    content = message["content"] or [{"text": ""}]
    opening = content if isinstance(content, str) else content[0].get("text", "")
    if not written.lstrip().startswith(opening.strip()):
        raise ValueError(
            f"messages[{i}]: the chat template writes a header before the answer, but not for an answer that is to "
            "come; let it do so `if add_generation_prompt`"
        )


def _joined(spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Characters that the template's markers hold, runs that touch joined."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _agreed(text: str, answers: list[Answer], spans: list[tuple[int, int]]) -> list[Answer]:
    """The answers that the markers hold; ValueError naming the turn where prefix rendering says otherwise.

    Markers may leave out the stop token or include what is written after it, and some templates mark the line break
    that ends the header: the label is what the model writes after the header, up to its stop token.
    """
    left = list(spans)
    agreed = []
    for answer in answers:
        mine = [span for span in left if span[0] < answer.end and span[1] > answer.start]
        left = [span for span in left if span not in mine]
        # An empty answer whose stop token is not marked has no characters to mark.
        (start, end), *more = mine or [(answer.start, answer.start)]
        in_header = start < answer.start and not text[start : answer.start].strip()
        start = answer.start if in_header else start
        if more or start != answer.start or end not in (answer.words, answer.stop, answer.end):
            raise ValueError(
                f"messages[{answer.message}]: the chat template marks the characters {mine} as generated, but the "
                f"answer and its stop token stand at {answer.start} to {answer.stop}; correct the template's "
                "{% generation %} markers or remove them"
            )
        agreed.append(answer._replace(start=start))
    left = [span for span in left if span[1] > span[0]]
    if left:
        raise ValueError(f"the chat template marks the characters {left} as generated, which are in no assistant turn")
    return agreed
