"""The task `free`: the user's own messages; what a good answer is, the user's own reward says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from vlmalign.config import Config
from vlmalign.tasks.blocks import reasoning_of
from vlmalign.tasks.conversation import last_answer, up_to_answer
from vlmalign.tasks.facts import Facts
from vlmalign.tasks.prompts import own_columns

if TYPE_CHECKING:
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example


class FreeTask(Config):
    """Asks the row's messages as they stand. A column `truth`, where there is one, goes into predictions."""

    kind: Literal["free"] = "free"

    def ask(self, example: Example) -> list[Message]:
        return up_to_answer(example)

    def write(self, example: Example) -> str:
        """Raises ValueError for a row without an answer."""
        return last_answer(example)

    def truth(self, example: Example) -> Any:
        return example.meta.get("truth")

    def columns(self, example: Example) -> dict[str, Any]:
        return own_columns(example)

    def read(self, completion: str, columns: Mapping[str, Any]) -> Facts:
        """`values` is the text. A think block in it is read as reasoning, whatever its form."""
        del columns
        return Facts(valid=True, values=completion, reasoning=reasoning_of(completion))
