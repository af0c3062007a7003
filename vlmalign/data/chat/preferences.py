"""Preference files -> groups of two: JSON Lines of {"prompt", "chosen", "rejected"}, in the layouts that TRL reads.

Each of the three is a list of turns (`messages.Message`) or text: a prompt's text is one user turn, an answer's text one
assistant turn, and all of them go through the checkpoint's chat template (TRL leaves texts without one). Where "prompt"
is not given, it is the turns with which both answers begin. Images are parts of a turn's content; with a list "images"
beside the three, parts {"type": "image"} take its paths in order, prompt first. Paths are relative to the file's folder.

Continuation 0 is the chosen answer, 1 the rejected one. The prompt ends where the first answer begins, not where answers
that begin alike come apart: tokens they share are part of both, for the losses that are not of a difference.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vlmalign.data.chat.chat import Chat
from vlmalign.data.chat.messages import Message, check_messages, label_weight
from vlmalign.data.films.images import BadImage
from vlmalign.data.sources.tables import inside
from vlmalign.types import Group, Segment

#: why a pair can be refused
REASONS = (
    "malformed",  # no JSON, a key missing, a turn that is none
    "empty completion",
    "equal completions",
    "image",  # missing, unreadable, or outside the file's folder
    "conversation",  # what the chat template cannot write, or text that spells its control tokens
    "prompt too long",
    "completion too long",
)
ON_BAD = ("error", "skip")


class BadPair(ValueError):
    """A pair that cannot be trained on; the message names file and line."""

    def __init__(self, name: str, reason: str, message: str):
        assert reason in REASONS
        super().__init__(f"{name}: {message}")
        self.name, self.reason = name, reason


class Limits(NamedTuple):
    """Longest segments in tokens, soft tokens included; None for no limit. Nothing is cut: an answer would lose its end."""

    prompt: int | None = None
    completion: int | None = None


class Preferences(NamedTuple):
    """The pairs of a file, and those that were left out of it."""

    groups: list[Group]  #: `id` is the line, counted from 0
    skipped: list[BadPair]

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> pairs skipped for it, in the order of REASONS."""
        found = Counter(bad.reason for bad in self.skipped)
        return {reason: found[reason] for reason in REASONS if found[reason]}


def read_preferences(path: str | Path, chat: Chat, *, limits: Limits = Limits(), on_bad: str = "error") -> Preferences:
    """Every pair of a JSON Lines file; empty lines are passed over.

    Raises:
        BadPair: (a ValueError) for the first bad pair when `on_bad` is "error".
        ValueError: when no pair is left.
    """
    if on_bad not in ON_BAD:
        raise ValueError(f"on_bad must be one of {', '.join(ON_BAD)}; found {on_bad!r}")
    path = Path(path)
    found = Preferences([], [])
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if not line.strip():
                continue
            name = f"{path.name}:{index + 1}"
            try:
                found.groups.append(_pair(line, name, path.parent, chat, index, limits))
            except BadPair as bad:
                if on_bad == "error":
                    raise
                found.skipped.append(bad)
    if not found.groups:
        why = ", ".join(f"{count} {reason}" for reason, count in found.reasons.items()) or "it is empty"
        raise ValueError(f"{path} has no pair to learn from: {why}")
    return found


def _pair(line: bytes, name: str, root: Path, chat: Chat, index: int, limits: Limits) -> Group:
    group = preference_group(_row(line, name), name, chat, group_id=index, root=root)
    longest = max(len(each) for each in group.continuations)
    if limits.prompt is not None and len(group.prompt) > limits.prompt:
        raise BadPair(
            name, "prompt too long", f"the prompt has {len(group.prompt)} tokens, the limit is {limits.prompt}"
        )
    if limits.completion is not None and longest > limits.completion:
        raise BadPair(name, "completion too long", f"an answer has {longest} tokens, the limit is {limits.completion}")
    return group


def preference_group(
    row: Mapping[str, Any], name: str, chat: Chat, *, group_id: int, root: Path | None = None
) -> Group:
    """The group of two that a row makes. Image paths lie under `root`; None: they are absolute, and checked.

    Raises:
        BadPair: for a row that cannot be trained on; `name` says which row it is.
    """
    prompt, chosen, rejected = _turns(row, name)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer or answer[0]["role"] != "assistant":
            role = answer[0]["role"] if answer else "nothing"
            raise BadPair(
                name, "malformed", f'"{side}" must begin with an assistant turn, found {role}; give the answer alone'
            )
        if not label_weight(answer[0]) > 0:
            raise BadPair(
                name, "malformed", f'"{side}" begins with a turn of weight 0; such turns belong to the prompt'
            )
        if not any(_text(turn).strip() for turn in answer if turn["role"] == "assistant"):
            raise BadPair(name, "empty completion", f'"{side}" is empty')
    # The prompt's own answers are context: labels begin with the turn that is compared.
    context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in prompt]
    try:
        sides = [[*context, *answer] for answer in (chosen, rejected)]
        if root is not None:
            sides = [_located(messages, root) for messages in sides]
        group = _join(*(chat.example(messages, group_id=group_id) for messages in sides))
    except (BadImage, FileNotFoundError) as error:
        raise BadPair(name, "image", str(error)) from error
    except ValueError as error:
        raise BadPair(name, "conversation", str(error)) from error
    one, other = group.continuations
    if np.array_equal(one.tokens, other.tokens) and np.array_equal(one.image, other.image):
        raise BadPair(name, "equal completions", '"chosen" and "rejected" are the same tokens: there is no preference')
    return group


def _row(line: bytes, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        # The error's own text quotes none of the line, which may be a patient's.
        raise BadPair(name, "malformed", f"not a line of JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadPair(name, "malformed", f"expected an object, found {type(row).__name__}")
    return row


def _turns(row: Mapping[str, Any], name: str) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen, rejected) as checked turns, images in place."""
    both_turns = all(isinstance(row.get(side), list) for side in ("chosen", "rejected"))
    missing = [
        key for key in ("prompt", "chosen", "rejected") if key not in row and not (key == "prompt" and both_turns)
    ]
    if missing:
        raise BadPair(name, "malformed", f'no "{missing[0]}"; expected "prompt", "chosen" and "rejected"')
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    parts = {key: _as_turns(row[key], role) for key, role in roles.items() if key in row}
    if "images" in row:
        parts = _placed(parts, row["images"], name)
    for key, turns in parts.items():
        try:
            check_messages(turns)
        except (ValueError, TypeError) as error:
            raise BadPair(name, "malformed", f'"{key}": {error}') from error
    chosen, rejected = parts["chosen"], parts["rejected"]
    if "prompt" in parts:
        return parts["prompt"], chosen, rejected
    pairs = zip(chosen, rejected, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chosen), len(rejected)))
    if same == len(chosen) == len(rejected):
        raise BadPair(name, "equal completions", '"chosen" and "rejected" are the same turns: there is no preference')
    if same == 0:
        raise BadPair(name, "malformed", 'no "prompt", and "chosen" and "rejected" begin with different turns')
    return chosen[:same], chosen[same:], rejected[same:]


def _as_turns(value: Any, role: str) -> Any:
    """A text as one turn of `role`; anything else is left for `check_messages`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _text(turn: Message) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _placed(parts: Mapping[str, Any], images: Any, name: str) -> dict[str, Any]:
    """Image parts without a path filled from the row's list: the prompt's first, then each answer with what follows."""
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise BadPair(name, "malformed", '"images" must be a list of paths')
    start, used, found = 0, [0], {}
    for key, turns in parts.items():
        left = iter(images[start:])
        found[key] = _filled(turns, left)
        used.append(len(images) - sum(1 for _ in left))
        start = used[-1] if key == "prompt" else start
    if max(used) != len(images):
        raise BadPair(name, "malformed", f'"images" holds {len(images)}, the turns have places for {max(used)}')
    return found


def _filled(turns: Any, left: Iterator[str]) -> Any:
    if not isinstance(turns, list):
        return turns
    filled = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if isinstance(content, list):
            parts = [{"type": "image", "image": next(left, None)} if _awaits(part) else part for part in content]
            turn = {**turn, "content": parts}
        filled.append(turn)
    return filled


def _awaits(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is None


def _located(messages: Sequence[Message], root: Path) -> list[Message]:
    """The turns with absolute image paths that lie under `root`."""

    def locate(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "image":
            return part
        try:
            return {**part, "image": str(inside(root, part["image"]))}
        except ValueError as error:
            raise BadImage(str(error)) from error

    return [
        turn if isinstance(turn["content"], str) else {**turn, "content": [locate(part) for part in turn["content"]]}
        for turn in messages
    ]


def _join(chosen: Group, rejected: Group) -> Group:
    """One group of both; the images of the rejected side are numbered as the union has them."""
    assert np.array_equal(chosen.prompt.tokens, rejected.prompt.tokens), "a prompt is written apart from its answers"
    images = tuple(dict.fromkeys((*chosen.images, *rejected.images)))
    # A last entry for -1, which stands for no image.
    number = np.array([*(images.index(key) for key in rejected.images), -1], np.int32)
    (other,) = rejected.continuations
    other = Segment(other.tokens, number[other.image], other.weight)
    return Group(chosen.id, chosen.prompt, (*chosen.continuations, other), images)
