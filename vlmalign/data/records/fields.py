"""The fields of a record: what a cell of the table may hold, what it is read as, and how a summary tells it.

Cells are text as `text_table` gives them, "" where there is nothing. A value is a number, a word, true or false, a text or a
list of names, None where nothing is known.
"""

from __future__ import annotations

import difflib
import math
import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from vlmalign.config import Config
from vlmalign.data.sources.text_table import as_text
from vlmalign.quoting import quoted, shown

#: input: known before the decision, may be told; decision: what is asked; group: a centre, a year: for splits, never told;
#: after: known only after the decision, never told
Role = Literal["input", "decision", "group", "after"]
Length = Annotated[int, Field(ge=1)]
#: code -> word; a list: codes that are words themselves
Codes = Annotated[
    dict[str, str], BeforeValidator(lambda given: {str(c): str(c) for c in given} if isinstance(given, list) else given)
]

#: whole numbers from here on are told as floats are, in few digits
MOST_WHOLE = 1e15
YES, NO = ("1", "true", "yes", "y"), ("0", "false", "no", "n")
_WHOLE = re.compile(r"(-?\d+)\.0+")


class _Field(Config):
    """What all kinds have in common."""

    column: str | None = None  #: of the table; None: the field's own name
    label: str | None = None  #: what the summary calls it; None: its own name
    role: Role = "input"
    required: bool = False  #: a record without it cannot be used
    missing: tuple[str, ...] = ()  #: further texts that say that nothing is known

    def tell(self, value: Any) -> str:
        """A value in words."""
        return str(value)


class NumberField(_Field):
    """A number in `unit`, from `low` to `high`."""

    kind: Literal["number"]
    unit: str | None = None
    low: float | None = None
    high: float | None = None

    def read(self, cell: Any) -> int | float:
        """Raises ValueError, without the value, for what is no number and for one out of range."""
        try:
            number = float(_text(cell))
        except ValueError:
            raise ValueError("not a number") from None
        low, high = self.low, self.high
        if not math.isfinite(number) or (low is not None and number < low) or (high is not None and number > high):
            between = f"{'-inf' if low is None else f'{low:g}'} to {'inf' if high is None else f'{high:g}'}"
            raise ValueError(f"out of range ({between}{'' if self.unit is None else f' {self.unit}'})")
        return int(number) if number.is_integer() and abs(number) < MOST_WHOLE else number

    def tell(self, value: Any) -> str:
        return str(value) if self.unit is None else f"{value} {self.unit}"


class Coded(Config):
    """A column and the words for its codes; other codes say nothing, and the next column is asked."""

    column: str
    codes: Codes


class CodeField(_Field):
    """A code, read as its word: one column's, or that of the first of several columns that holds one of its codes."""

    kind: Literal["code"]
    codes: Codes = Field(default_factory=dict)  #: code -> word, or a list of words; none: any word may come
    first_of: tuple[Coded, ...] = ()  #: in place of `column` and `codes`

    @model_validator(mode="after")
    def _one_form(self) -> CodeField:
        if self.first_of and (self.codes or self.column is not None):
            raise ValueError("first_of names its own columns and codes; leave column and codes out")
        return self

    @property
    def words(self) -> tuple[str, ...]:
        """What it may be, in the order of the codes; empty where any code may come."""
        tables = [each.codes for each in self.first_of] or [self.codes]
        return tuple(dict.fromkeys(word for codes in tables for word in codes.values()))

    def read(self, cell: Any) -> str:
        """Raises ValueError for a code that is not listed, with the nearest that is."""
        return _word(_text(cell), self.codes) if self.codes else _text(cell)

    def read_first(self, cells: tuple[Any, ...]) -> str | None:
        """The word of the first cell that holds a code of its column; None where all are blank.

        Raises ValueError for a code of the last column that it does not list.
        """
        for each, cell in zip(self.first_of, cells, strict=True):
            text = _text(cell)
            if not text:
                continue
            try:
                return _word(text, each.codes)
            except ValueError:
                if each is self.first_of[-1]:
                    raise
        return None


class FlagField(_Field):
    """True or false: 1 or 0, true or false, yes or no."""

    kind: Literal["flag"]

    def read(self, cell: Any) -> bool:
        text = _text(cell).lower()
        text = _plain(text)
        if text not in (*YES, *NO):
            raise ValueError(f"neither yes nor no ({', '.join(YES)}; {', '.join(NO)})")
        return text in YES

    def tell(self, value: Any) -> str:
        return "yes" if value else "no"


class TextField(_Field):
    """Free text."""

    kind: Literal["text"]
    longest: Length = 1000  #: characters

    def read(self, cell: Any) -> str:
        return _no_longer(_text(cell), self.longest)


class ListField(_Field):
    """Several names: a list, or one text with a separator."""

    kind: Literal["list"]
    separator: Annotated[str, Field(min_length=1)] = ";"
    codes: Codes = Field(default_factory=dict)  #: as of a code; none: the names are as they are written
    longest: Length = 1000  #: characters, of all names

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.codes.values()))

    def read(self, cell: Any) -> list[str]:
        parts = (
            [_text(as_text(part)) for part in cell]
            if isinstance(cell, list | tuple)
            else _text(cell).split(self.separator)
        )
        names = [name for part in parts if (name := part.strip())]
        _no_longer(", ".join(names), self.longest)
        return list(dict.fromkeys(_word(name, self.codes) if self.codes else name for name in names))

    def tell(self, value: Any) -> str:
        return ", ".join(value) or "none"


AnyRecordField = Annotated[NumberField | CodeField | FlagField | TextField | ListField, Field(discriminator="kind")]


def _text(cell: Any) -> str:
    if not isinstance(cell, str):
        raise ValueError(f"expected a text or a number, found {'an object' if isinstance(cell, dict) else 'a list'}")
    return cell.strip()


def _plain(text: str) -> str:
    """Tables with gaps turn whole numbers into floats.

    >>> _plain("1.0"), _plain("PGT-A")
    ('1', 'PGT-A')
    """
    found = _WHOLE.fullmatch(text)
    return found.group(1) if found else text


def _word(text: str, codes: dict[str, str]) -> str:
    if text in codes:
        return codes[text]
    known = {_plain(code): word for code, word in codes.items()}
    if _plain(text) in known:
        return known[_plain(text)]
    near = difflib.get_close_matches(text, codes, n=1, cutoff=0.5)
    raise ValueError(f"unknown code {quoted(text, 40)}" + (f" (the nearest is {shown(near[0], 40)})" if near else ""))


def _no_longer(text: str, longest: int) -> str:
    if len(text) > longest:
        raise ValueError(f"longer than {longest} characters")
    return text
