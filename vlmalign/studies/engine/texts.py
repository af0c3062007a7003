"""Cases -> tokens: what a stage learns from, and the questions that wait for completions.

A case that cannot be used stops the run, or with `on_bad: skip` is left out; both name file and line, or the case. Limits
on lengths are applied here, since lengths are the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from vlmalign.data.chat.chat import Chat
from vlmalign.data.chat.messages import Message
from vlmalign.data.chat.preferences import preference_group
from vlmalign.data.films.images import BadImage
from vlmalign.data.lengths import fit
from vlmalign.rewards.user_file import TURNS
from vlmalign.studies.engine.data_config import Data
from vlmalign.tasks.tasks import AnyTask, taught
from vlmalign.training.rollouts import Task as Question
from vlmalign.types import Example, Group

#: columns that rewards are given by whoever calls them
RESERVED = ("prompts", "completions", "completion_ids", "completion_tokens")

Item = TypeVar("Item", Group, Question)

#: (number, case): the number is what a group is called by and its draws are derived from
Numbered = Iterator[tuple[int, Example]]

#: raises for an image that cannot be used; the key is its path
CheckImage = Callable[[str], None]


class LeftOut(NamedTuple):
    """A case that was not taken as it is."""

    name: str  #: file and line, or the case's id
    what: str  #: "skipped" or "truncated"
    reason: str


class Texts(NamedTuple):
    """What a set or file gave."""

    items: list[Any]  #: groups, or questions
    cases: list[Example]  #: of the items, in their order
    left_out: list[LeftOut]

    @property
    def groups(self) -> list[Group]:
        """The groups, and of questions the prompts."""
        return [item.prompt if isinstance(item, Question) else item for item in self.items]


def answers_to_learn(cases: Numbered, data: Data, chat: Chat, task: AnyTask, check: CheckImage) -> Texts:
    """Groups of one continuation: the task's question with the answer that it writes, or a row's own turns."""

    def make(number: int, case: Example) -> Group:
        return chat.example(taught(task, case), group_id=number, name=case.id)

    return _gather(cases, data, make, check, data.max_completion)


def pairs_to_learn(cases: Numbered, data: Data, chat: Chat, task: AnyTask, check: CheckImage) -> Texts:
    """Groups of two: chosen and rejected."""
    del task  # pairs are written out whole

    def make(number: int, case: Example) -> Group:
        return preference_group(case.meta, chat, group_id=number)

    return _gather(cases, data, make, check, data.max_completion)


def questions(
    cases: Numbered,
    data: Data,
    chat: Chat,
    task: AnyTask,
    check: CheckImage,
    *,
    turns_too: bool = False,
    columns: Sequence[str] = (),
) -> Texts:
    """Prompts that wait for completions, with the columns that rewards are given; `turns_too`: the prompt's turns among
    them. `columns` are None where a case has none.

    Rows that end with an answer are questions to be answered in an evaluation; as prompts of training they are a mistake.

    Raises:
        ValueError: also when cases differ in their columns, or a column has a name that rewards get from elsewhere.
    """

    def make(number: int, case: Example) -> Question:
        turns = list(task.ask(case))
        own = {**dict.fromkeys(columns), **task.columns(case), **({TURNS: turns} if turns_too else {})}
        return Question(chat.prompt(turns, group_id=number), prompt_text(turns), own)

    found = _gather(cases, data, make, check, None)
    _check_columns(found)
    return found


def prompts(
    cases: Numbered,
    data: Data,
    chat: Chat,
    task: AnyTask,
    check: CheckImage,
    *,
    turns_too: bool = False,
    columns: Sequence[str] = (),
) -> Texts:
    """`questions` for a stage that samples their answers: a row that brings one is refused."""

    def waiting() -> Numbered:
        for number, case in cases:
            turns = case.meta.get("messages")
            if turns and turns[-1]["role"] == "assistant":
                raise ValueError(f"{case.id}: the last turn is an answer, and a prompt waits for one; leave it out")
            yield number, case

    return questions(waiting(), data, chat, task, check, turns_too=turns_too, columns=columns)


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


def _gather(
    cases: Numbered, data: Data, make: Callable[[int, Example], Item], check: CheckImage, completion: int | None
) -> Texts:
    found = Texts([], [], [])
    for number, case in cases:
        try:
            item = make(number, case)
            for key in (item.prompt if isinstance(item, Question) else item).images:
                check(key)
        except (ValueError, FileNotFoundError) as error:
            if data.on_bad == "error":
                kind = BadImage if isinstance(error, BadImage) else ValueError
                reason = str(error).removeprefix(f"{case.id}: ")
                raise kind(f"{case.id}: {reason}; correct the row, or set on_bad to skip") from error
            found.left_out.append(LeftOut(case.id, "skipped", str(error)))
            continue
        kept = _fitted(case.id, item, data, completion, found.left_out)
        if kept is not None:
            found.items.append(kept)
            found.cases.append(case)
    return found


def _fitted(name: str, item: Item, data: Data, completion: int | None, left_out: list[LeftOut]) -> Item | None:
    """The item within the limits; None for one that is left out. `left_out` gets what was done to it."""
    group = item.prompt if isinstance(item, Question) else item
    start = f"group {group.id}: "
    on_long = "skip" if isinstance(item, Question) and data.on_long == "truncate" else data.on_long
    try:
        fitted = fit([group], prompt=data.max_prompt, completion=completion, on_long=on_long)
    except ValueError as error:
        raise ValueError(f"{name}: {str(error).removeprefix(start)}") from error
    left_out += [LeftOut(name, "skipped", text.removeprefix(start)) for text in fitted.skipped]
    left_out += [LeftOut(name, "truncated", text.removeprefix(start)) for text in fitted.truncated]
    if not fitted.groups:
        return None
    return item._replace(prompt=fitted.groups[0]) if isinstance(item, Question) else fitted.groups[0]


def _check_columns(found: Texts) -> None:
    tasks: Sequence[Question] = found.items
    for task, case in zip(tasks, found.cases, strict=True):
        if taken := sorted(task.columns.keys() & set(RESERVED)):
            raise ValueError(f"{case.id}: a column is called {taken[0]!r}, which rewards are given anyway; rename it")
        if differ := sorted(task.columns.keys() ^ tasks[0].columns.keys()):
            other = found.cases[0].id
            has, lacks = (other, case.id) if differ[0] in tasks[0].columns else (case.id, other)
            raise ValueError(
                f"{has} has a column {differ[0]!r}, {lacks} has not; give every row the same columns, null where there "
                "is nothing"
            )
