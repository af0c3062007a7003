"""Rows of turns as people write them -> one form: conversations, preference pairs, and records of any other columns.

    conversations   {"messages": [turns], columns ...}          also with the turns under "prompt", as TRL writes prompts
    preferences     {"prompt", "chosen", "rejected"}            each a list of turns or text; without "prompt" it is the
                                                                turns with which both answers begin
    records         {columns ...}                               questions with options, fields of a patient, ...

Images are parts of a turn's content, {"type": "image", "image": path}. With a column "images" (or "image") beside the
turns, parts {"type": "image"} without a path take its paths in order; where there are none, the images stand before the
first user turn's text, as TRL places them. "prompt" and "completion", text or turns, are one conversation of which the
completion alone is learnt from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vlmalign.data.chat.messages import Message, check_messages

PAIR = ("prompt", "chosen", "rejected")
_ROLES = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
#: what some data sets write in a text where an image belongs
_TAG = "<image>"

#: a path, or a stored image, as a row has it -> the absolute path of a file
Locate = Callable[[Any], str]


def layout_of(row: Mapping[str, Any]) -> str:
    """Which layout a row has: conversations, preferences or records.

    >>> layout_of({"chosen": "No.", "rejected": "Yes."}), layout_of({"question": "Why?"})
    ('preferences', 'records')
    """
    if {"chosen", "rejected"} & row.keys():
        return "preferences"
    turns = "messages" in row or isinstance(row.get("prompt"), list) or {"prompt", "completion"} <= row.keys()
    return "conversations" if turns else "records"


def arranged(row: Mapping[str, Any], layout: str, locate: Locate) -> dict[str, Any]:
    """A row in the one form of its layout: turns checked, images located, every other column as it is.

    Raises:
        ValueError: for what is missing or malformed, and whatever `locate` raises.
    """
    if layout == "conversations":
        return _conversation(row, locate)
    return _pair(row, locate) if layout == "preferences" else _record(row, locate)


def _conversation(row: Mapping[str, Any], locate: Locate) -> dict[str, Any]:
    key = "messages" if "messages" in row else "prompt"
    found = _bare(row.get(key))
    used = {key, "images", "image", "tools"}
    if key == "prompt" and row.get("completion") is not None:
        found = _completed(found, _bare(_as_turns(row["completion"], "assistant")))
        used.add("completion")
    if not isinstance(found, list):
        raise ValueError('expected an object {"messages": [turns]}')
    if row.get("tools"):
        raise ValueError('"tools" is not supported: the chat template would not be given them; drop the column')
    rest = {name: value for name, value in row.items() if name not in used}
    turns = {"messages": found}
    if images := _images(row):
        turns = _placed(turns, images)
    placed = _located(turns["messages"], locate)
    _refuse_tags(placed)
    return {"messages": placed, **rest}


def _completed(prompt: Any, completion: Any) -> Any:
    """The turns of a prompt and of its completion, which alone is learnt from, as in TRL."""
    turns = _as_turns(prompt, "user")
    for name, found in (("prompt", turns), ("completion", completion)):
        if not isinstance(found, list):
            raise ValueError(f'"{name}" must be text or a list of turns')
    before = [
        {**turn, "weight": 0.0} if isinstance(turn, Mapping) and turn.get("role") == "assistant" else turn
        for turn in turns
    ]
    return [*before, *completion]


def _refuse_tags(turns: Sequence[Message]) -> None:
    """Raises ValueError for a turn that spells an image's tag in its text: the model would see these letters and no film."""
    for i, turn in enumerate(turns):
        content = turn["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        if any(_TAG in text for text in texts):
            raise ValueError(
                f'messages[{i}] spells {_TAG} in its text, which shows no image; write a part {{"type": "image", "image": '
                f'path}} where it belongs, or {{"type": "image"}} and its path in "images"'
            )


def _pair(row: Mapping[str, Any], locate: Locate) -> dict[str, Any]:
    both_turns = all(isinstance(row.get(side), list) for side in ("chosen", "rejected"))
    for key in PAIR:
        if row.get(key) is None and not (key == "prompt" and both_turns):
            raise ValueError(f'no "{key}"; expected "prompt", "chosen" and "rejected"')
    parts = {key: _bare(_as_turns(row[key], role)) for key, role in _ROLES.items() if row.get(key) is not None}
    if images := _images(row):
        parts = _placed(parts, images)
    for key, turns in parts.items():
        try:
            parts[key] = _located(turns, locate)
        except ValueError as error:
            raise type(error)(f'"{key}": {error}') from error
    rest = {name: value for name, value in row.items() if name not in (*PAIR, "images", "image")}
    return {**_divided(parts), **rest}


def _divided(parts: Mapping[str, Any]) -> dict[str, list[Message]]:
    """Prompt, chosen and rejected, where the prompt may stand at the beginning of both answers."""
    if "prompt" in parts:
        return dict(parts)
    chosen, rejected = parts["chosen"], parts["rejected"]
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        raise ValueError('"chosen" and "rejected" are the same turns: there is no preference')
    if same == 0:
        raise ValueError('no "prompt", and "chosen" and "rejected" begin with different turns')
    return {"prompt": chosen[:same], "chosen": chosen[same:], "rejected": rejected[same:]}


def _record(row: Mapping[str, Any], locate: Locate) -> dict[str, Any]:
    found = dict(row)
    for name, value in row.items():
        # Columns of another name are images where they are stored as `datasets` stores them.
        if (name == "image" and value is not None) or (
            isinstance(value, Mapping) and value.keys() == {"bytes", "path"}
        ):
            found[name] = locate(value)
    if row.get("images") is not None:
        found["images"] = [locate(image) for image in _images({"images": row["images"]})]
    return found


def _images(row: Mapping[str, Any]) -> list[Any]:
    images = row.get("images")
    if images is not None and not isinstance(images, list):
        raise ValueError('"images" must be a list of images')
    return [*(images or []), *([row["image"]] if row.get("image") is not None else [])]


def _as_turns(value: Any, role: str) -> Any:
    """A text as one turn of `role`; anything else is left for `check_messages`."""
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _bare(turns: Any) -> Any:
    """The turns without the nulls that tables put where a turn or a part has no such field."""
    if not isinstance(turns, list):
        return turns
    return [_without_nulls(turn, keep=("content",)) for turn in turns]


def _without_nulls(value: Any, keep: Sequence[str] = ()) -> Any:
    if not isinstance(value, Mapping):
        return value
    found = {key: item for key, item in value.items() if item is not None or key in keep}
    if isinstance(content := found.get("content"), list):
        found["content"] = [_without_nulls(part) for part in content]
    return found


def _placed(parts: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
    """Image parts without an image filled from the row's list: the prompt's first, then each answer with what follows."""
    if not any(_image_parts(turns) for turns in parts.values()):
        return _in_front(parts, images)
    start, used, found = 0, [0], {}
    for key, turns in parts.items():
        left = iter(images[start:])
        found[key] = _filled(turns, left)
        used.append(len(images) - sum(1 for _ in left))
        start = used[-1] if key == "prompt" else start
    if max(used) != len(images):
        raise ValueError(f'"images" holds {len(images)}, the turns have places for {max(used)}')
    return found


def _image_parts(turns: Any) -> bool:
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _in_front(parts: Mapping[str, Any], images: list[Any]) -> dict[str, Any]:
    """The images before the text of the first user turn."""
    first = next(iter(parts))
    turns = parts[first] if isinstance(parts[first], list) else []
    for i, turn in enumerate(turns):
        if isinstance(turn, Mapping) and turn.get("role") == "user":
            content = turn.get("content")
            texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not isinstance(texts, list):
                break
            if any(isinstance(part, Mapping) and _TAG in str(part.get("text")) for part in texts):
                raise ValueError(
                    f'{first}[{i}] spells {_TAG} in its text; write parts {{"type": "image"}} where "images" belong'
                )
            shown = [{"type": "image", "image": image} for image in images]
            return {**parts, first: [*turns[:i], {**turn, "content": [*shown, *texts]}, *turns[i + 1 :]]}
    raise ValueError(f'"images" holds {len(images)}, and "{first}" has no user turn to show them in')


def _filled(turns: Any, left: Iterator[Any]) -> Any:
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


def _located(turns: Any, locate: Locate) -> list[Message]:
    """The turns, checked, with the absolute path of every image."""

    def placed(part: Any) -> Any:
        shown = isinstance(part, Mapping) and part.get("type") == "image" and part.get("image") is not None
        return {**part, "image": locate(part["image"])} if shown else part

    if not isinstance(turns, list):
        raise ValueError(f"expected a list of turns or text, found {type(turns).__name__}")
    found = [
        {**turn, "content": [placed(part) for part in turn["content"]]}
        if isinstance(turn, Mapping) and isinstance(turn.get("content"), list)
        else turn
        for turn in turns
    ]
    check_messages(found)
    return found
