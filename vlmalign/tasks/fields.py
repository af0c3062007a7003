"""The task `fields`: a structured answer, a JSON object or tagged fields, by a schema that the config declares."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from vlmalign.config import Config
from vlmalign.tasks.blocks import Form, in_blocks, read_blocks
from vlmalign.tasks.facts import Facts
from vlmalign.tasks.field_kinds import AnyField
from vlmalign.tasks.json_text import find_object
from vlmalign.tasks.prompts import Prompt, column, fill, own_columns, user_turn
from vlmalign.tasks.spelling import fold

if TYPE_CHECKING:
    from vlmalign.data.chat.messages import Message
    from vlmalign.types import Example


class FieldsTask(Config):
    """Fields with declared kinds. The truth of a field is the row's column of the same name, or of `columns_of`.

    The prompt may hold columns of the row. It should show the layout: {"strategy": ..., "dose": ...} for `json`,
    <strategy>...</strategy><dose>...</dose> for `tags`.
    """

    kind: Literal["fields"] = "fields"
    prompt: Prompt
    fields: dict[str, AnyField]
    layout: Literal["json", "tags"] = "json"
    form: Form = "plain"
    trace: str = "trace"  #: column: the reasoning that the form `think` teaches
    columns_of: dict[str, str] = Field(default_factory=dict)  #: field -> column with its truth, where they differ

    @field_validator("fields")
    @classmethod
    def _names_that_can_be_tags(cls, fields: dict[str, AnyField]) -> dict[str, AnyField]:
        if not fields:
            raise ValueError("fields must hold at least one field, found none")
        if wrong := [
            name for name in fields if not re.fullmatch(r"[A-Za-z]\w*", name) or name in ("think", "solution")
        ]:
            raise ValueError(f"a field's name must be letters, digits and underscores, found {wrong[0]!r}; rename it")
        if len({fold(name) for name in fields}) < len(fields):
            raise ValueError(f"fields must differ in more than case and underscores, found {', '.join(fields)}")
        return fields

    @field_validator("columns_of")
    @classmethod
    def _of_fields(cls, columns_of: dict[str, str], info: Any) -> dict[str, str]:
        known = info.data.get("fields", columns_of)
        if unknown := [name for name in columns_of if name not in known]:
            raise ValueError(f"columns_of names the field {unknown[0]!r}, expected one of {', '.join(known)}")
        return columns_of

    def ask(self, example: Example) -> list[Message]:
        return user_turn(example, fill(self.prompt, example.meta))

    def write(self, example: Example) -> str:
        """The true fields in the layout. Raises ValueError for a row that lacks a required one, or the trace where the
        form has reasoning."""
        truth = self.truth(example)
        if missing := [name for name, field in self.fields.items() if field.required and truth[name] is None]:
            raise ValueError(f"{example.id} has no value for the field {missing[0]!r}, so there is nothing to teach")
        told = {name: value for name, value in truth.items() if value is not None}
        if self.layout == "json":
            answer = json.dumps({name: _number(value) for name, value in told.items()}, ensure_ascii=False)
        else:
            answer = "".join(f"<{name}>{_written(value)}</{name}>" for name, value in told.items())
        return in_blocks(self.form, str(column(example, self.trace)) if self.form == "think" else "", answer)

    def truth(self, example: Example) -> dict[str, Any]:
        """Field -> value as `read` gives it, None where the column is null or not there.

        Raises ValueError naming example and field for a value that the field cannot have.
        """
        found: dict[str, Any] = {}
        for name, field in self.fields.items():
            value = example.meta.get(self.columns_of.get(name, name))
            try:
                found[name] = None if value is None else field.read(value)
            except ValueError as error:
                raise ValueError(
                    f"{example.id}: the true value of field {name!r} {error}; correct the column"
                ) from None
        return found

    def columns(self, example: Example) -> dict[str, Any]:
        return own_columns(example) | {"truth": self.truth(example)}

    def read(self, completion: str, columns: Mapping[str, Any]) -> Facts:
        """`values`: field -> value, None where it is not given or cannot be read. Valid: every field that is given can
        be read, and the required ones are given. Unknown: fields and values that the schema does not know."""
        del columns
        blocks = read_blocks(completion, self.form)
        nothing = dict.fromkeys(self.fields)
        if blocks.reason is not None:
            return Facts(valid=False, values=nothing, reason=blocks.reason)
        try:
            given = find_object(blocks.solution) if self.layout == "json" else self._tagged(blocks.solution)
        except ValueError as error:
            problem = str(error) if self.layout == "tags" else "expected one JSON object"
            return Facts(valid=False, values=nothing, reasoning=blocks.reasoning, reason=problem)
        names = {fold(name): name for name in self.fields}
        unknown = [name for name in given if fold(name) not in names]
        written = {names[fold(name)]: value for name, value in given.items() if fold(name) in names}
        values: dict[str, Any] = dict(nothing)
        reasons = []
        for name, field in self.fields.items():
            value = written.get(name)
            if value is None or value == "":
                reasons += [f"the field {name} is missing"] if field.required else []
                continue
            try:
                values[name] = field.read(value)
            except ValueError as error:
                reasons.append(f"the field {name} {error}")
                unknown.append(f"{name}: {json.dumps(value, ensure_ascii=False)}")
        return Facts(
            valid=not reasons,
            values=values,
            unknown=tuple(unknown),
            reasoning=blocks.reasoning,
            reason="; ".join(reasons) or None,
        )

    def _tagged(self, text: str) -> dict[str, str]:
        found: dict[str, str] = {}
        for name in self.fields:
            opened, closed = text.count(f"<{name}>"), text.count(f"</{name}>")
            if (opened, closed) not in ((0, 0), (1, 1)):
                raise ValueError(f"expected one <{name}> and one </{name}>, found {opened} and {closed}")
            if opened:
                value, end, _ = text.partition(f"<{name}>")[2].partition(f"</{name}>")
                if not end:
                    raise ValueError(f"expected <{name}> before </{name}>, found them the other way round")
                found[name] = value.strip()
        return found


def _number(value: Any) -> Any:
    """Whole numbers are written without a decimal point."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _written(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(_number(value))
