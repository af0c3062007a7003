"""Conversations as data sets write them: turns with a role and a content, which is text or parts of text and images."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

#: one turn: {"role": ..., "content": text or [{"type": "text", "text": ...} | {"type": "image", "image": key}]};
#: an assistant's may also hold "weight", the loss weight of its tokens (default 1)
Message = Mapping[str, Any]

#: largest weight of a turn: beyond it one turn would drown all others, and at last the range of floats
MOST_WEIGHT = 1e3
#: how other tools call the switch that takes a turn out of the loss
SWITCHES = ("loss", "train", "trainable", "loss_weight", "mask", "masked", "learn")


def check_messages(messages: Sequence[Any]) -> None:
    """Raises ValueError naming the first turn that is not as `Message` says."""
    if not messages:
        raise ValueError("the conversation has no turns")
    for i, message in enumerate(messages):
        problem = _problem(message)
        if problem:
            raise ValueError(f"messages[{i}]: {problem}")


def _problem(message: Any) -> str | None:
    if not isinstance(message, Mapping):
        return f"expected an object with role and content, found {type(message).__name__}"
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        return f"role must be text, found {type(role).__name__}"
    if not isinstance(content, str | list | tuple):
        return f"content must be text or a list of parts, found {type(content).__name__}"
    for j, part in enumerate([] if isinstance(content, str) else content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image") or not isinstance(part.get(kind), str):
            return f'content[{j}] must be {{"type": "text", "text": ...}} or {{"type": "image", "image": path}}'
    for key, value in message.items():
        if key not in ("role", "content", "weight") and isinstance(value, bool | int | float):
            near = ', whose name here is "weight" (0: not learnt from)' if key in SWITCHES else ""
            return f"nobody reads {key!r}{near}; a turn holds role, content, weight, and text that the chat template writes"
    if (weight := message.get("weight")) is not None:
        if role != "assistant":
            return f"weight belongs to assistant turns, found it on {role}"
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 <= weight <= MOST_WEIGHT:
            # A text may be a patient's, and a whole number may have any number of digits.
            told = (
                f"{weight:g}"
                if (number and abs(weight) < 1e300) or isinstance(weight, float)
                else type(weight).__name__
            )
            return f"weight must be a number from 0 to {MOST_WEIGHT:g}, found {told}"
    return None


def label_weight(message: Message) -> float:
    """Loss weight of a turn's tokens: 0 for all but the assistant's.

    >>> label_weight({"role": "user", "content": "?"}), label_weight({"role": "assistant", "content": "!"})
    (0.0, 1.0)
    """
    weight = message.get("weight")
    return 0.0 if message["role"] != "assistant" else 1.0 if weight is None else float(weight)


def image_keys(messages: Sequence[Message]) -> list[str]:
    """Key of each image, in order, repetitions kept."""
    return [
        part["image"]
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] == "image"
    ]


def for_template(messages: Sequence[Message], *, parts: bool) -> list[dict[str, Any]]:
    """The turns as a chat template takes them: without weights, a lone text part as text.

    Templates of text models write a list of parts out as code, so where images have no place (`parts` False) several
    text parts become one text; and so do those of a system turn, of which Gemma 3's template writes the first alone.
    Tables fill the fields that a row does not have with null: templates that ask whether a field is there see none.
    """
    turns = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            joined = not parts or len(content) == 1 or message["role"] == "system"
            if joined and not image_keys([message]):
                content = "".join(part["text"] for part in content)
            else:
                content = [{"type": part["type"], part["type"]: part[part["type"]]} for part in content]
        kept = {k: v for k, v in message.items() if k != "weight" and v is not None}
        turns.append({**kept, "content": content})
    return turns


class ControlTokens:
    """Finds tokens that only a chat template may write, in text that comes from elsewhere.

    A report that spells an image's token would shift the images, one that spells the end of a turn would forge a turn.
    """

    def __init__(self, tokens: Iterable[str]):
        self.tokens = frozenset(tokens)
        self._lengths = sorted({len(token) for token in self.tokens})
        # A tokenizer may have thousands; all begin with one of few characters.
        first = "".join(sorted({token[0] for token in self.tokens}))
        self._first = re.compile(f"[{re.escape(first)}]") if first else re.compile(r"(?!)")

    def find(self, text: str) -> str | None:
        """The first of the tokens in `text`.

        >>> ControlTokens(["<eos>", "<bos>"]).find("p < 0.05 <bos>")
        '<bos>'
        """
        for match in self._first.finditer(text):
            for length in self._lengths:
                if (found := text[match.start() : match.start() + length]) in self.tokens:
                    return found
        return None

    def refuse(self, messages: Sequence[Message]) -> None:
        """Raises ValueError naming the turn and the token, if any turn's text spells one."""
        for i, message in enumerate(messages):
            found = next(filter(None, map(self.find, (*_texts(message), *_joined(message["content"])))), None)
            if found:
                raise ValueError(
                    f"messages[{i}] ({message['role']}) spells {found!r} in its text, a token that only the chat "
                    "template may write; images are given as parts of their own, and other such text must be removed"
                )


def _joined(content: Any) -> list[str]:
    """Texts of parts end to end, with and without the space between them: what templates make of them."""
    if isinstance(content, str):
        return []
    texts = [part["text"] if part["type"] == "text" else "\n" for part in content]
    return ["".join(texts), "".join(text.strip() or text for text in texts)]


def _texts(value: Any) -> Iterator[str]:
    """Every text in a message that a template might write out; paths of images are not."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        if value.get("type") != "image":
            for item in value.values():
                yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
