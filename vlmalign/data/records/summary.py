"""A record in words, by a template: what a model reads of a patient.

    {age}-year-old patient. AMH: {amh}.
    Causes: tubal disease {tubal}, male factor {male}.

{name} is the field's value in words, with its unit. Without a template each input has a line of its own, "AMH: 1.2 ng/ml". Its
length is bounded, since those of texts and lists are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from vlmalign.config import Config
from vlmalign.data.records.fields import AnyRecordField

_SLOT = re.compile(r"\{(\w+)\}")


class Summary(Config):
    """How a record is told."""

    template: str | None = None  #: text with {field}; None: a line for each input
    #: what is written where nothing is known; None: a line that names such a field is left out
    missing: str | None = "not recorded"

    def lines(self, fields: Mapping[str, AnyRecordField]) -> list[str]:
        """The template, line by line."""
        if self.template is not None:
            return self.template.strip().split("\n")
        return [f"{title(name, field)}: {{{name}}}" for name, field in fields.items() if field.role == "input"]

    def told(self, fields: Mapping[str, AnyRecordField]) -> list[str]:
        """The fields that it tells, in the schema's order.

        Raises ValueError for one that the schema does not have, and for one that is not known before the decision.
        """
        names = {name for line in self.lines(fields) for name in _SLOT.findall(line)}
        if unknown := sorted(names - fields.keys()):
            raise ValueError(f"summary.template: there is no field {unknown[0]!r}; fields are {', '.join(fields)}")
        if hidden := [name for name in fields if name in names and fields[name].role != "input"]:
            raise ValueError(
                f"summary.template: {hidden[0]!r} has the role {fields[hidden[0]].role}, and only inputs may be told: what "
                "is asked, or known only afterwards, would be given away; take it out of the template"
            )
        if not names:
            raise ValueError("summary: it tells no field; name one in the template, or give a field the role input")
        return [name for name in fields if name in names]


def summarise(
    lines: Sequence[str], fields: Mapping[str, AnyRecordField], values: Mapping[str, Any], missing: str | None
) -> str:
    """The lines with every {field} filled in."""

    def tell(found: re.Match[str]) -> str:
        value = values[found.group(1)]
        return missing or "" if value is None else fields[found.group(1)].tell(value)

    kept = [
        line for line in lines if missing is not None or all(values[name] is not None for name in _SLOT.findall(line))
    ]
    return "\n".join(_SLOT.sub(tell, line) for line in kept)


def title(name: str, field: AnyRecordField) -> str:
    """What a field is called at the beginning of a line."""
    called = field.label or name.replace("_", " ")
    return called[:1].upper() + called[1:]
