"""The task `choice`: a question with lettered options, of which one or several are right."""

from __future__ import annotations

import string
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from vlmalign.config import Config
from vlmalign.tasks.blocks import Form, in_blocks, read_blocks, reasoning_of
from vlmalign.tasks.choice_letters import choice_letters
from vlmalign.tasks.facts import Facts
from vlmalign.tasks.prompts import Prompt, column, fill, own_columns, user_turn

if TYPE_CHECKING:
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example


class ChoiceTask(Config):
    """Questions of a table. The prompt may hold {question}, {options} (one a line: "A. ...") and columns of the row."""

    kind: Literal["choice"] = "choice"
    prompt: Prompt = "{question}\n\n{options}\n\nAnswer with the letter of the right option."
    question: str = "question"  #: column
    options: str = "options"  #: column: a list of texts, or an object of letter and text
    answer: str = "answer"  #: column: a letter, several ("ABD"), or the index of an option, from 0
    trace: str = "trace"  #: column: the reasoning that the form `think` teaches
    form: Form = "plain"

    def ask(self, example: Example) -> list[Message]:
        options = "\n".join(f"{letter}. {text}" for letter, text in self._options(example).items())
        slots = {**example.meta, "question": column(example, self.question), "options": options}
        return user_turn(example, fill(self.prompt, slots))

    def write(self, example: Example) -> str:
        """The letter of the right option. Raises ValueError for a row without an answer, or without a trace where the
        form has reasoning."""
        letters = self.truth(example)
        if letters is None:
            raise ValueError(f"{example.id} has no answer in column {self.answer!r}, so there is nothing to teach")
        return in_blocks(self.form, str(column(example, self.trace)) if self.form == "think" else "", letters)

    def truth(self, example: Example) -> str | None:
        """The letters of the right options, sorted; None where the row has no answer.

        Raises ValueError for an answer that is no option.
        """
        answer, letters = example.meta.get(self.answer), "".join(self._options(example))
        if answer is None:
            return None
        if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
            return letters[answer]
        chosen = {letter for letter in answer.upper() if letter not in " ,"} if isinstance(answer, str) else set()
        if not chosen or chosen - set(letters):
            raise ValueError(
                f"{example.id}: column {self.answer!r} must hold letters among {letters} or the index of an option, "
                "found something else; correct it, or name the right column"
            )
        return "".join(sorted(chosen))

    def columns(self, example: Example) -> dict[str, Any]:
        answer = self.truth(example)
        return own_columns(example) | {"truth": answer, "answer": answer, "options": self._options(example)}

    def read(self, completion: str, columns: Mapping[str, Any]) -> Facts:
        """`values` are the letters it settles on (see `choice_letters`), None where that would be a guess."""
        form = read_blocks(completion, self.form).reason
        letters = choice_letters(completion, "".join(columns["options"])) if form is None else None
        missing = (
            None if letters is not None else "expected the letter of an option, found none or several to guess from"
        )
        return Facts(
            valid=letters is not None,
            values=letters,
            reasoning=reasoning_of(completion),
            reason=form or missing,
        )

    def _options(self, example: Example) -> dict[str, str]:
        found = column(example, self.options)
        if isinstance(found, list | tuple):
            found = dict(zip(string.ascii_uppercase, found, strict=False)) if len(found) <= 26 else {}
        if not isinstance(found, Mapping) or len(found) < 2 or set(found) - set(string.ascii_uppercase):
            raise ValueError(
                f"{example.id}: column {self.options!r} must hold 2 to 26 options, as a list of texts or an object of "
                f"capital letter and text, found {type(found).__name__}; correct it, or name the right column"
            )
        return {letter: str(text) for letter, text in sorted(found.items())}
