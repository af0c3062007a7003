"""What a study shows: cases, and the answers of each arm under a number that does not follow from its name.

Arms get numbers, *slots*, in the order of their answers' digests. Design and pages know slots only, so nothing that
follows from them depends on how the arms are called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vlmalign.review.identity import binding, protocol_hash
from vlmalign.review.protocol import Protocol
from vlmalign.review.seeded import digest


@dataclass(frozen=True)
class Film:
    path: Path
    sha256: str


@dataclass(frozen=True)
class Case:
    id: str  #: never sent to a reader: it may be a file's name
    record: tuple[tuple[str, str], ...]  #: (column's title, text)
    films: tuple[Film, ...] = ()

    @property
    def digest(self) -> str:
        """Of what a reader sees of it."""
        return digest(self.record, [film.sha256 for film in self.films])


@dataclass(frozen=True)
class Answer:
    text: str  #: as it is shown
    author: str | None  #: the reader who wrote it
    form: Mapping[str, int]  #: length and formatting as it was written


@dataclass(frozen=True)
class Slot:
    """An arm under a number that does not follow from its name."""

    name: str
    guess: str
    answers: Mapping[str, Answer]  #: by case

    @property
    def digest(self) -> str:
        return digest(sorted((case, answer.text) for case, answer in self.answers.items()))


@dataclass(frozen=True)
class Known:
    """An attention case."""

    case: Case
    answers: tuple[Answer, ...]
    expected: int  #: index of the better answer


@dataclass(frozen=True)
class Material:
    cases: Mapping[str, Case]
    slots: tuple[Slot, ...]
    known: Mapping[str, Known]
    left_out: tuple[tuple[str, str], ...] = ()  #: (case, reason)
    notes: tuple[str, ...] = field(default=())  #: what a coordinator should know, counted

    @property
    def contents(self) -> dict[str, Any]:
        """Digests of what is shown, for the protocol's hash."""
        return {
            "cases": digest(sorted((case.id, case.digest) for case in self.cases.values())),
            "arms": {slot.name: slot.digest for slot in self.slots},
            "attention": digest(
                sorted(
                    (known.case.id, known.case.digest, [answer.text for answer in known.answers], known.expected)
                    for known in self.known.values()
                )
            ),
        }

    def case(self, name: str) -> Case:
        return self.cases[name] if name in self.cases else self.known[name].case

    def answer(self, case: str, slot: int) -> Answer:
        """The answer of a slot to a case; of an attention case, its answer number `slot`."""
        return self.slots[slot].answers[case] if case in self.cases else self.known[case].answers[slot]


@dataclass(frozen=True)
class Study:
    """A protocol with all that it shows: what the server, the export and the checks work on."""

    protocol: Protocol
    material: Material

    @cached_property
    def settings(self) -> dict[str, Any]:
        return binding(self.protocol)

    @cached_property
    def hash(self) -> str:
        return protocol_hash(self.settings, self.material.contents)
