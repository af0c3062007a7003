"""Rows of the user's files -> groups and tasks, each checked by file and line before anything is trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from vlmalign.data.chat.chat import Chat
from vlmalign.data.chat.messages import Message, check_messages
from vlmalign.data.chat.preferences import read_preferences
from vlmalign.data.films.images import BadImage, load_image
from vlmalign.data.lengths import fit
from vlmalign.data.sources.tables import inside
from vlmalign.studies.align.data_config import Examples, Prompts
from vlmalign.training.rollouts import Task
from vlmalign.types import Group

#: columns that rewards are given by whoever calls them
RESERVED = ("prompts", "completions", "completion_ids", "completion_tokens")

Item = TypeVar("Item")


class LeftOut(NamedTuple):
    """A row that was not taken as it is."""

    name: str  #: file and line
    what: str  #: "skipped" or "truncated"
    reason: str


class Read(NamedTuple):
    """What a file gave."""

    items: list[Any]  #: groups, or tasks
    left_out: list[LeftOut]


#: rows that an earlier start of the run skipped, by name: they are skipped again without a look
Known = Mapping[str, LeftOut]

#: raises for an image that cannot be used; the key is its path
CheckImage = Callable[[str], None]


def decode_once() -> CheckImage:
    """Decodes every image it is asked about, once, at a fraction of its size."""
    seen: set[str] = set()

    def check(key: str) -> None:
        if key not in seen:
            load_image(key, size_hint=64)
            seen.add(key)

    return check


def read_conversations(rows: Examples, chat: Chat, check: CheckImage, known: Known) -> Read:
    """Groups of one continuation from {"messages": [...]}, numbered by line; other fields are left alone."""
    found = Read([], [])
    for name, number, line in _lines(rows.path):

        def one(line: bytes = line, number: int = number) -> Group:
            return _checked(chat.example(_messages(_row(line), rows.path.parent), group_id=number), check)

        group = _attempt(name, rows, one, known, found.left_out)
        if group is not None and (kept := _fitted(name, group, rows, rows.max_completion, found.left_out)):
            found.items.append(kept)
    return found


def read_pairs(rows: Examples, chat: Chat, check: CheckImage, known: Known) -> Read:
    """Groups of two from a preference file (`data.preferences`), numbered by line."""
    pairs = read_preferences(rows.path, chat, on_bad=rows.on_bad)
    found = Read([], [LeftOut(bad.name, "skipped", str(bad).removeprefix(f"{bad.name}: ")) for bad in pairs.skipped])
    for pair in pairs.groups:
        name = f"{rows.path.name}:{pair.id + 1}"
        group = _attempt(name, rows, lambda pair=pair: _checked(pair, check), known, found.left_out)
        if group is not None and (kept := _fitted(name, group, rows, rows.max_completion, found.left_out)):
            found.items.append(kept)
    return found


def read_prompts(rows: Prompts, chat: Chat, check: CheckImage, known: Known) -> Read:
    """Tasks from {"messages": [...], columns}, numbered by line.

    Raises:
        ValueError: also when rows differ in their columns, or a column has a name that rewards get from elsewhere.
    """
    found = Read([], [])
    for name, number, line in _lines(rows.path):

        def one(line: bytes = line, number: int = number) -> Task:
            row = _row(line)
            messages = _messages(row, rows.path.parent)
            if messages[-1]["role"] == "assistant":
                raise ValueError("the last turn is an answer, and a prompt waits for one; leave it out")
            group = _checked(chat.prompt(messages, group_id=number), check)
            return Task(group, prompt_text(messages), {key: row[key] for key in row if key != "messages"})

        task = _attempt(name, rows, one, known, found.left_out)
        if task is not None and (kept := _fitted(name, task.prompt, rows, None, found.left_out)):
            found.items.append(task._replace(prompt=kept))
    _check_columns(rows.path, found.items)
    return found


def prompt_text(messages: Sequence[Message]) -> str:
    """A prompt as rewards and the log of completions see it: its text, with roles where there are several turns.

    >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which side?"}])
    'system: Be brief.\\nuser: Which side?'
    """
    texts = [
        turn["content"]
        if isinstance(turn["content"], str)
        else "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        for turn in messages
    ]
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"{turn['role']}: {text}" for turn, text in zip(messages, texts, strict=True))


def _lines(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """(file and line, its number from 1, the line) of every line that is not empty."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name}:{number}", number, line


def _attempt(
    name: str, rows: Examples | Prompts, make: Callable[[], Item], known: Known, left_out: list[LeftOut]
) -> Item | None:
    """What a row gives; None, and an entry in `left_out`, for one that is skipped."""
    if name in known:
        left_out.append(known[name])
        return None
    try:
        return make()
    except (ValueError, FileNotFoundError) as error:
        if rows.on_bad == "error":
            kind = BadImage if isinstance(error, BadImage) else ValueError
            raise kind(f"{name}: {error}; correct the row, or set on_bad to skip") from error
        left_out.append(LeftOut(name, "skipped", str(error)))
        return None


def _fitted(
    name: str, group: Group, rows: Examples | Prompts, completion: int | None, left_out: list[LeftOut]
) -> Group | None:
    """The group within the limits; None for one that is left out. `left_out` gets what was done to it."""
    start = f"group {group.id}: "
    try:
        fitted = fit([group], prompt=rows.max_prompt, completion=completion, on_long=rows.on_long)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(start)}") from error
    left_out += [LeftOut(name, "skipped", text.removeprefix(start)) for text in fitted.skipped]
    left_out += [LeftOut(name, "truncated", text.removeprefix(start)) for text in fitted.truncated]
    return fitted.groups[0] if fitted.groups else None


def _checked(group: Group, check: CheckImage) -> Group:
    for key in group.images:
        check(key)
    return group


def _row(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:
        # The error's own text quotes none of the line, which may be a patient's.
        raise ValueError(f"not a line of JSON ({error})") from None
    if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
        raise ValueError('expected an object {"messages": [...]}')
    return row


def _messages(row: Mapping[str, Any], root: Path) -> list[Message]:
    """The turns, with absolute paths of images that lie under `root`."""
    check_messages(row["messages"])

    def locate(part: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**part, "image": str(inside(root, part["image"]))} if part["type"] == "image" else part

    return [
        turn if isinstance(turn["content"], str) else {**turn, "content": [locate(part) for part in turn["content"]]}
        for turn in row["messages"]
    ]


def _check_columns(path: Path, tasks: Sequence[Task]) -> None:
    for task in tasks:
        line = f"{path.name}:{task.prompt.id}"
        if taken := sorted(task.columns.keys() & set(RESERVED)):
            raise ValueError(f"{line}: a column is called {taken[0]!r}, which rewards are given anyway; rename it")
        if differ := sorted(task.columns.keys() ^ tasks[0].columns.keys()):
            other = f"{path.name}:{tasks[0].prompt.id}"
            has, lacks = (other, line) if differ[0] in tasks[0].columns else (line, other)
            raise ValueError(
                f"{has} has a column {differ[0]!r}, {lacks} has not; give every row the same columns, null where there "
                "is nothing"
            )
