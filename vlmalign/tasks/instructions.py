"""The task `instructions`: a request with constraints on the answer that can be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from vlmalign.config import Config
from vlmalign.tasks.blocks import answer_of, reasoning_of
from vlmalign.tasks.constraints import satisfied
from vlmalign.tasks.conversation import last_answer, up_to_answer
from vlmalign.tasks.facts import Facts
from vlmalign.tasks.prompts import Prompt, column, fill, own_columns, user_turn

if TYPE_CHECKING:
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example


class InstructionsTask(Config):
    """The row's messages, or a prompt made of its columns; its constraints are of the kinds in `tasks.constraints`."""

    kind: Literal["instructions"] = "instructions"
    prompt: Prompt | None = None  #: with columns such as {prompt}; null: the row's messages
    constraints: str = "constraints"  #: column: a list of {"kind": ..., ...}
    answer: str = "answer"  #: column: the answer that SFT teaches, where the rows have no messages

    def ask(self, example: Example) -> list[Message]:
        if self.prompt is None:
            return up_to_answer(example)
        return user_turn(example, fill(self.prompt, example.meta))

    def write(self, example: Example) -> str:
        """Raises ValueError for a row without an answer."""
        return last_answer(example) if self.prompt is None else str(column(example, self.answer))

    def truth(self, example: Example) -> list[dict[str, Any]]:
        """The constraints. Raises ValueError for one of another kind or with other arguments."""
        found = column(example, self.constraints)
        if not isinstance(found, Sequence) or isinstance(found, str) or not all(isinstance(c, Mapping) for c in found):
            raise ValueError(
                f"{example.id}: column {self.constraints!r} must hold a list of objects such as "
                '{"kind": "words", "high": 100}, found something else; correct it'
            )
        for constraint in found:
            try:
                satisfied("", constraint)
            except ValueError as error:
                raise ValueError(f"{example.id}: {error}") from error
        return [dict(constraint) for constraint in found]

    def columns(self, example: Example) -> dict[str, Any]:
        constraints = self.truth(example)
        return own_columns(example) | {"truth": constraints, "constraints": constraints}

    def read(self, completion: str, columns: Mapping[str, Any]) -> Facts:
        """`values`: for each constraint, whether the answer satisfies it."""
        answer = answer_of(completion)
        return Facts(
            valid=bool(answer),
            values=[satisfied(answer, constraint) for constraint in columns["constraints"]],
            reasoning=reasoning_of(completion),
            reason=None if answer else "expected an answer, found no text",
        )
