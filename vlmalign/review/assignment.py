"""What each reader reads, in which order and on which side: a function of the seed, the readers and what is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

from vlmalign.review.blocks import arm_blocks, reader_blocks
from vlmalign.review.material import Study
from vlmalign.review.seeded import generator, shuffled

Purpose = Literal["case", "repeat", "attention", "guess", "adjudication"]
LETTERS = "ABCDEF"


@dataclass(frozen=True)
class Place:
    """One page of a reader's study."""

    position: int  #: 1, 2, ... in the reader's order
    purpose: Purpose
    case: str
    shown: tuple[int, ...]  #: slots (of an attention case: numbers of its answers) in the order A, B, ...

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.shown)]


def assign(study: Study) -> dict[str, list[Place]]:
    """Reader -> the pages to read, in order. Adjudicators have none before readers disagree.

    Raises:
        ValueError: when a reader would have too few cases for the repeats or guesses that the protocol asks for.
    """
    protocol, material = study.protocol, study.material
    seed, design = protocol.seed, protocol.design
    cases = shuffled(material.cases, seed, "cases")
    by_case = reader_blocks(len(cases), len(protocol.readers), design.readers_per_case, seed)
    arms = arm_blocks(cases, by_case, len(material.slots), design.answers, seed)
    own: dict[str, dict[str, tuple[int, ...]]] = {reader: {} for reader in protocol.readers}
    for case, readers, combo in zip(cases, by_case, arms, strict=True):
        for number in readers:
            own[protocol.readers[number]][case] = combo
    # A replacement reads the cases of the one who left, in an order of its own.
    own |= {new: own[left] for new, left in protocol.replacements.items()}
    return {reader: _places(study, reader, combos) for reader, combos in own.items()}


def _places(study: Study, reader: str, combos: Mapping[str, tuple[int, ...]]) -> list[Place]:
    seed, design = study.protocol.seed, study.protocol.design
    order = shuffled(combos, seed, "order", reader)
    shown = _sides(seed, reader, [(case, combos[case]) for case in order])
    half = len(order) // 2
    if design.repeats > half or design.guesses > len(order):
        raise ValueError(
            f"reader {reader} has {len(order)} cases, too few for design.repeats {design.repeats} (at most half of them) and "
            f"design.guesses {design.guesses}; ask for fewer, or raise design.readers_per_case"
        )
    chance = generator(seed, "places", reader)
    pages: list[tuple[float, Purpose, str, tuple[int, ...]]] = [
        (i, "case", case, shown[case]) for i, case in enumerate(order)
    ]
    for case in shuffled(order[:half], seed, "repeats", reader)[: design.repeats]:
        # At least half of the reader's cases lie between a case and its repetition.
        where = chance.uniform(order.index(case) + half, len(order))
        pages.append((where, "repeat", case, shown[case][::-1]))
    if design.attention is not None:
        each = design.attention.each
        for i, case in enumerate(shuffled(study.material.known, seed, "attention", reader)[:each]):
            where = chance.uniform(i, i + 1) * len(order) / each
            pages.append(
                (where, "attention", case, tuple(shuffled(range(design.answers), seed, "sides", reader, case)))
            )
    pages.sort(key=lambda page: page[0])
    guessed = _to_guess(seed, reader, order, shown, design.guesses)
    pages += [(0.0, "guess", case, shown[case]) for case in guessed]
    return [Place(number, *page[1:]) for number, page in enumerate(pages, start=1)]


def _sides(seed: int, reader: str, cases: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """The order in which each case shows its slots: every permutation of a combination equally often (by at most one),
    in runs of all permutations that are themselves in random order.
    """
    count: Counter[tuple[int, ...]] = Counter()
    found = {}
    for case, combo in cases:
        ways = list(permutations(combo)) if len(combo) <= 4 else [combo[i:] + combo[:i] for i in range(len(combo))]
        turn, place = divmod(count[combo], len(ways))
        found[case] = shuffled(ways, seed, "sides", reader, turn)[place]
        count[combo] += 1
    return found


def _to_guess(
    seed: int, reader: str, order: Sequence[str], shown: Mapping[str, tuple[int, ...]], guesses: int
) -> list[str]:
    """Cases to guess the writers of: those first whose slots were guessed least."""
    seen: Counter[int] = Counter()
    left = shuffled(order, seed, "guesses", reader)
    chosen = []
    for _ in range(guesses):
        case = min(left, key=lambda case: sum(seen[slot] for slot in shown[case]))
        left.remove(case)
        seen.update(shown[case])
        chosen.append(case)
    return chosen
