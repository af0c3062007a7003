"""Rows that bring their own conversation: the part that is asked, and the answer at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlmalign.tasks.prompts import column

if TYPE_CHECKING:
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example


def up_to_answer(example: Example) -> list[Message]:
    """The row's messages without an assistant's turn at the end: they end with a user's turn.

    Raises ValueError for a row without messages or with a turn of another role there.
    """
    messages = list(column(example, "messages"))
    if messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user":
        found = messages[-1]["role"] if messages else "no turn"
        raise ValueError(
            f"{example.id}: expected messages that end with a user's turn or an answer to it, found {found}"
        )
    return messages


def last_answer(example: Example) -> str:
    """What the assistant says at the end. Raises ValueError where the messages do not end with its turn."""
    messages = column(example, "messages")
    if not messages or messages[-1]["role"] != "assistant":
        raise ValueError(f"{example.id}: its messages do not end with an answer, so there is nothing to teach")
    content = messages[-1]["content"]
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
