"""The table of tasks: kind in a config -> its class. A new kind is one file and one line here.

A task is the pair of a question and its reading:

    ask(example) -> messages          what is asked; it ends with a user's turn
    write(example) -> text            the answer that SFT teaches; ValueError where there is none
    truth(example) -> JSON or None    as it stands in predictions
    columns(example) -> dict          what rewards are given by keyword, and `read` looks at
    read(completion, columns) -> Facts
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from vlmalign.tasks.choice import ChoiceTask
from vlmalign.tasks.conversation import last_answer
from vlmalign.tasks.fields import FieldsTask
from vlmalign.tasks.free import FreeTask
from vlmalign.tasks.instructions import InstructionsTask
from vlmalign.tasks.labels import LabelsTask

if TYPE_CHECKING:
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example

Task = LabelsTask | ChoiceTask | FieldsTask | InstructionsTask | FreeTask

#: as the section of a config
AnyTask = Annotated[Task, Field(discriminator="kind")]

TASKS: Mapping[str, type[Task]] = MappingProxyType(
    {
        "labels": LabelsTask,
        "choice": ChoiceTask,
        "fields": FieldsTask,
        "instructions": InstructionsTask,
        "free": FreeTask,
    }
)


def taught(task: Task, example: Example) -> list[Message]:
    """The conversation that SFT teaches: the question and its answer, or a free row's messages with their own weights.

    Raises ValueError where there is no answer.
    """
    if isinstance(task, FreeTask):
        last_answer(example)
        return list(example.meta["messages"])
    return [*task.ask(example), {"role": "assistant", "content": task.write(example)}]
