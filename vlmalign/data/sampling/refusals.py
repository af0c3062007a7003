"""What is said when sets cannot be drawn: which label in which set, whether that is proved, and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlmalign.data.sampling.bounds import Bound, Bounds
from vlmalign.data.sampling.exact import MOST_UNKNOWNS, SECONDS, Drawn, Programme


@dataclass(frozen=True)
class Shortfall:
    """A label that cannot have, or did not get, what its floor asks for."""

    label: str
    where: str  #: the sets concerned
    needed: int
    available: int
    unit: str  #: "films" or "patients"

    def __str__(self) -> str:
        return f"{self.label} needs {self.needed} {self.unit} ({self.where}), {self.available} available"


@dataclass(frozen=True)
class Excess:
    """A label that cannot stay, or did not stay, within its cap."""

    label: str
    where: str  #: the set concerned
    allowed: int  #: films
    found: int  #: films

    def __str__(self) -> str:
        return f"{self.label} may have {self.allowed} films ({self.where}), has {self.found}"


class ShortfallError(ValueError):
    """Some labels cannot keep their floor or cap; `shortfalls` and `excesses` name each with what it needs and gets."""

    def __init__(self, shortfalls: Sequence[Shortfall], excesses: Sequence[Excess], remedy: str):
        self.shortfalls, self.excesses = tuple(shortfalls), tuple(excesses)
        named = "; ".join(map(str, [*shortfalls, *excesses]))
        super().__init__(f"labels do not keep their floors or caps: {named}. {remedy}")


class Asked(NamedTuple):
    """What was asked for, as far as a refusal speaks of it."""

    label_names: Sequence[str]
    sizes: Mapping[str, int]
    bounds: Bounds
    floor: Bound | None  #: where it is the floor of every label
    films_per_patient: int | None

    def too_few(self, shortfalls: Sequence[Shortfall], programme: Programme) -> ShortfallError:
        """For labels that have too few films or patients in the whole pool."""
        limit = self.films_per_patient
        rule = "No patient is in two sets" + (
            "" if limit is None else f", and a set takes at most {limit} films of a patient"
        )
        return ShortfallError(
            shortfalls, (), f"{rule}. {self._reachable(programme)}{self._help('leave the label out')}"
        )

    def none_found(self, counts: np.ndarray | None, programme: Programme, drawn: Drawn | None) -> ValueError:
        """For sets that neither the search, which ended at counts [labels, sets], nor the programme, if asked, found."""
        if drawn is not None and drawn.proved and drawn.short is None:
            limit = (
                "" if self.films_per_patient is None else f" and at most {self.films_per_patient} films of a patient"
            )
            more = "" if self.films_per_patient is None else ", or raise films_per_patient"
            return ValueError(
                f"there are no sets of sizes {dict(self.sizes)} with no patient in two of them{limit}, whatever their "
                f"labels; reduce sizes{more}"
            )
        if drawn is None:
            why = (
                "The search found no sets that do; there may be some, but the pool is too large to settle it by integer "
                f"programming ({programme.unknowns} unknowns, at most {MOST_UNKNOWNS})"
            )
        elif drawn.proved:
            why = "There are no sets that do, by integer programming; fewest films are out of bounds if these are"
        else:
            why = f"The search found no sets that do, nor did {SECONDS:g} s of integer programming; there may be some"
        if drawn is not None and drawn.short is not None:
            short, over = drawn.short, drawn.over
        elif counts is not None:
            short, over = np.maximum(0, self.bounds.floor - counts), np.maximum(0, counts - self.bounds.cap)
        else:
            return ValueError(
                f"no film of a patient of no other set is left before all sets are full. {why}. {self._help()}"
            )
        remedy = f"{why}. {self._reachable(programme)}{self._help()}"
        return ShortfallError([*self._shortfalls(short)], [*self._excesses(over)], remedy)

    def _shortfalls(self, short: np.ndarray) -> Iterator[Shortfall]:
        for label, set in np.argwhere(short).tolist():
            needed = int(self.bounds.floor[label, set])
            where = f"set {list(self.sizes)[set]}"
            yield Shortfall(self.label_names[label], where, needed, needed - int(short[label, set]), "films")

    def _excesses(self, over: np.ndarray) -> Iterator[Excess]:
        for label, set in np.argwhere(over).tolist():
            allowed = int(self.bounds.cap[label, set])
            where = f"set {list(self.sizes)[set]}"
            yield Excess(self.label_names[label], where, allowed, allowed + int(over[label, set]))

    def _reachable(self, programme: Programme) -> str:
        """How much of the floors these films allow; empty where the pool is too large to say."""
        if programme.unknowns > MOST_UNKNOWNS:
            return ""
        share, proved = programme.largest(self.bounds.asked, self.bounds.cap)
        if share is None:
            return "The sizes and caps cannot be had with any floor. " if proved else ""
        at_least = "" if proved else "at least "
        if self.floor is None:
            return f"All floors can be had at {at_least}{_down(share)} times what they are. "
        reached = int(share * self.floor + 1e-9) if isinstance(self.floor, int) else _down(share * self.floor)
        return f"The largest floor that can be had is {at_least}{reached}. "

    def _help(self, *more: str) -> str:
        ways = ["lower floor"] if self.bounds.floor.any() else []
        ways += ["raise cap"] if (self.bounds.cap < list(self.sizes.values())).any() else []
        ways += ["reduce sizes", *(["raise films_per_patient"] if self.films_per_patient is not None else []), *more]
        return f"Remedies: {', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else f"Remedy: {ways[0]}"


def _down(value: float) -> float:
    """Rounded down to four decimals: what is a little less can be had as well.

    >>> _down(1 / 3), _down(0.15)
    (0.3333, 0.15)
    """
    return int(value * 10_000 + 1e-6) / 10_000
