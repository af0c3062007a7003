"""The task `labels`: which labels of a schema hold for an image or a record, none, one or several."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from vlmalign.config import Config
from vlmalign.data.sources.schema import SCHEMAS, unknown_label
from vlmalign.tasks.blocks import Form, in_blocks
from vlmalign.tasks.facts import Facts
from vlmalign.tasks.label_reader import LabelReader
from vlmalign.tasks.prompts import Prompt, fill, own_columns, user_turn

if TYPE_CHECKING:
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example

#: separator -> how the prompt states it; labels are written with the first one that stands in none of them
_SEPARATORS = {
    ", ": "Separate the labels with commas.",
    "; ": "Separate the labels with semicolons.",
    "\n": "Write one label per line.",
}
#: column of a case that is asked for some of the labels only: those that its source knows
ASKED = "asked"
_NAMES_A_SEPARATOR = re.compile(
    r"comma|semicolon|separat|per line|each on|line break|bullet|JSON|逗号|分号", re.IGNORECASE
)


class LabelsTask(Config):
    """Labels in a solution block after reasoning in a think block.

    The prompt may hold {labels}, the names, and columns of the row, such as {age}. It states how the labels are to be
    separated: a sentence is added where it does not, unless `state_separator` is false.
    """

    kind: Literal["labels"] = "labels"
    prompt: Prompt
    labels: str | tuple[str, ...]  #: the name of a schema (see `data.sources.schema`), or the labels in order
    normal: str | None = None  #: the label that excludes all others; null: the schema's own, if a schema is named
    synonyms: dict[str, tuple[str, ...]] = Field(default_factory=dict)  #: label -> other names that are read as it
    form: Form = "think"
    state_separator: bool = True

    @field_validator("labels")
    @classmethod
    def _a_known_schema(cls, labels: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(labels, str) and labels not in SCHEMAS:
            raise ValueError(f"labels must be a list of names, or one of {', '.join(SCHEMAS)}, found {labels!r}")
        return labels

    @model_validator(mode="after")
    def _can_be_read(self) -> LabelsTask:
        reader = self.reader
        if self.normal is not None and self.normal not in reader.labels:
            raise ValueError(f"normal: {unknown_label(self.normal, reader.labels, 'labels')}")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The labels, in order."""
        return SCHEMAS[self.labels].labels if isinstance(self.labels, str) else self.labels

    @property
    def excludes(self) -> str | None:
        """The label that excludes all others."""
        if self.normal is None and isinstance(self.labels, str):
            return SCHEMAS[self.labels].normal
        return self.normal

    @property
    def reader(self) -> LabelReader:
        """What label rewards take in place of the names, so that they know the synonyms and the form too."""
        return LabelReader(self.names, tuple(self.synonyms.items()), self.form)

    @property
    def separator(self) -> str:
        """What stands between two labels of a written answer."""
        written = "".join(self.names)
        return next(mark for mark in _SEPARATORS if mark.strip() not in written or mark == "\n")

    @property
    def question(self) -> str:
        """The prompt with {labels} filled in and the separator stated."""
        return self._question(self.names)

    def _question(self, names: Sequence[str]) -> str:
        text = self.prompt.replace("{labels}", self.separator.join(names))
        if self.state_separator and not _NAMES_A_SEPARATOR.search(self.prompt):
            text = f"{text.rstrip()} {_SEPARATORS[self.separator]}"
        return text

    def ask(self, example: Example) -> list[Message]:
        return user_turn(example, fill(self._question(example.meta.get(ASKED, self.names)), example.meta))

    def write(self, example: Example) -> str:
        """The example's trace, or where nobody has written traces a sentence that names its labels, and the labels.

        Raises ValueError for a label that the task does not have, and where others have traces and this one has none.
        """
        for label in example.labels:
            if label not in self.names:
                raise ValueError(f"{example.id}: {unknown_label(label, self.names, 'the labels of the task')}")
        trace = example.meta.get("trace", label_trace(example.labels))
        if self.form == "think" and not trace:
            raise ValueError(f"{example.id}: there is no trace for it; write one, or leave it out with on_bad: skip")
        return answer_text(self.form, trace or "", example.labels, self.separator)

    def truth(self, example: Example) -> list[str]:
        return list(example.labels)

    def columns(self, example: Example) -> dict[str, Any]:
        return own_columns(example) | {"truth": self.truth(example)}

    def read(self, completion: str, columns: Mapping[str, Any]) -> Facts:
        """`values` are the labels in order. Notes: duplicates, text outside the blocks, and `contradiction`: the label
        that excludes all others stands beside another one."""
        del columns
        found = self.reader.read(completion)
        return Facts(
            valid=found.valid,
            values=list(found.predicted),
            unknown=found.unknown,
            reasoning=found.reasoning,
            reason=found.reason,
            notes={
                "duplicates": found.duplicates,
                "outside": found.outside,
                "contradiction": self.excludes in found.predicted and len(found.predicted) > 1,
            },
        )


def answer_text(form: Form, trace: str, labels: Sequence[str], separator: str = ", ") -> str:
    """The completion that is taught. An empty list is an empty block, or "none" where there are no blocks.

    >>> answer_text("think", "The heart is wide.", ["Cardiomegaly", "Edema"])
    '<think>The heart is wide.</think><solution>Cardiomegaly, Edema</solution>'
    """
    return in_blocks(form, trace, separator.join(labels) or ("none" if form == "plain" else ""))


def label_trace(labels: Sequence[str]) -> str:
    """Reasoning for films without a written trace: it names the positive labels and claims no evidence.

    >>> label_trace(["Cardiomegaly", "Edema"])
    'I see cardiomegaly and edema.'
    """
    if not labels:
        return "I see none of the listed findings."
    spoken = [label.replace("_", " ").lower() for label in labels]
    return f"I see {spoken[0] if len(spoken) == 1 else ', '.join(spoken[:-1]) + ' and ' + spoken[-1]}."
