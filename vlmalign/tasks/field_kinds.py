"""The kinds of a field of a structured answer, and how each reads a value: single, ordinal, number with unit, list."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlmalign.config import Config
from vlmalign.tasks.label_list import Synonyms, label_index, read_label_list
from vlmalign.tasks.spelling import bare, fold, visible

_LONGEST = 2_000  # characters; anything longer is no value
_NUMBER = re.compile(r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?) ?(.*)")


class _Options(Config):
    """Fields whose value is one of a few names."""

    options: tuple[str, ...]
    synonyms: dict[str, tuple[str, ...]] = Field(default_factory=dict)  #: option -> other names that are read as it
    required: bool = True  #: an answer without it is not valid

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> _Options:
        label_index(self.options, _pairs(self.synonyms))
        return self

    def read(self, value: Any) -> str:
        """The option that a value names. Raises ValueError where it names none: what was wrong, without the value."""
        text = _text(value)
        found = read_label_list(text, self.options, _pairs(self.synonyms))
        if len(found.labels) != 1 or found.unknown:
            raise ValueError("is not one of the options")
        return found.labels[0]


class SingleField(_Options):
    """One of several options without an order."""

    kind: Literal["single"] = "single"


class OrdinalField(_Options):
    """One of several options in order, the lowest first; how far off an answer is counts."""

    kind: Literal["ordinal"] = "ordinal"

    def steps(self, first: str, second: str) -> int:
        """How many steps lie between two options."""
        return abs(self.options.index(first) - self.options.index(second))


class NumberField(Config):
    """A number, in `unit`. An answer without a unit is taken to be in `unit`."""

    kind: Literal["number"] = "number"
    unit: str | None = None
    units: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(
        default_factory=dict
    )  #: other units -> how many `unit` one of them is: {"g": 1000} where unit is mg
    tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  #: in `unit`: still right
    relative_tolerance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  #: share of the truth: still right
    low: float | None = None  #: smaller ones are no value
    high: float | None = None  #: larger ones are no value
    required: bool = True

    @model_validator(mode="after")
    def _units_go_together(self) -> NumberField:
        if self.units and self.unit is None:
            raise ValueError("units need a unit to be told in; set unit")
        return self

    def read(self, value: Any) -> float:
        """The number in `unit`. Commas are read as thousands only: "1,5" would be a guess.

        Raises ValueError, without the value, for text that is not one number with a known unit and for one out of range.

        >>> NumberField(unit="mg", units={"g": 1000}).read("1.5 g")
        1500.0
        """
        if isinstance(value, int | float) and not isinstance(value, bool):
            number, unit = float(value), ""
        else:
            found = _NUMBER.fullmatch(_text(value).rstrip(". "))
            if found is None:
                raise ValueError("is not one number")
            number, unit = float(found.group(1).replace(",", "")), found.group(2)
        factors = {fold(name): factor for name, factor in self.units.items()} | {fold(self.unit or ""): 1.0, "": 1.0}
        if fold(unit) not in factors:
            raise ValueError("has an unknown unit")
        number *= factors[fold(unit)]
        if not math.isfinite(number) or not (
            (self.low is None or number >= self.low) and (self.high is None or number <= self.high)
        ):
            raise ValueError("is out of range")
        return number

    def agrees(self, value: float, truth: float) -> bool:
        """Whether a value counts as right."""
        return abs(value - truth) <= max(self.tolerance, self.relative_tolerance * abs(truth), 1e-9 * abs(truth))


class ListField(Config):
    """Several names in any order. Names outside `names` count as they are written, unless `closed`."""

    kind: Literal["list"] = "list"
    names: tuple[str, ...] = ()  #: how names are told, in order
    synonyms: dict[str, tuple[str, ...]] = Field(default_factory=dict)  #: name -> other names that are read as it
    closed: bool = False  #: a name outside `names` is no value
    required: bool = True

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> ListField:
        if self.closed and not self._known:
            raise ValueError("a closed list needs names")
        if self._known:
            label_index(self._known, _pairs(self.synonyms))
        return self

    @property
    def _known(self) -> tuple[str, ...]:
        return self.names or tuple(self.synonyms)

    def read(self, value: Any) -> list[str]:
        """The names, each once: those of `names` in their order, then the others, folded, in the order written.

        Raises ValueError, without the value, for what is no text or list of texts, and for another name if `closed`.
        """
        items = value if isinstance(value, list | tuple) else [value]
        labels: set[str] = set()
        others: dict[str, None] = {}
        for item in items:
            text = _text(item)
            if self._known:
                found = read_label_list(text, self._known, _pairs(self.synonyms))
                labels |= set(found.labels)
                names = found.unknown
            else:
                names = tuple(re.split(r"[,;\n，；、]", text))
            others |= {name: None for name in (fold(bare(written)) for written in names) if name}
        if self.closed and others:
            raise ValueError("has a name that is not one of the names")
        return [name for name in self._known if name in labels] + list(others)


AnyField = Annotated[SingleField | OrdinalField | NumberField | ListField, Field(discriminator="kind")]


def _pairs(synonyms: Mapping[str, tuple[str, ...]]) -> Synonyms:
    return tuple(synonyms.items())


def _text(value: Any) -> str:
    """A value as one text, without what leaves no mark."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError("is neither a text nor a number")
    text = visible(str(value)).strip()
    if len(text) > _LONGEST:
        raise ValueError("is too long")
    return text
