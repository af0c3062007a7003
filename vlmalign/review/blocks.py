"""Balanced incomplete blocks: which readers read a case, and which arms a case shows.

Each case is a block of r of R readers. Loads differ by at most one; pairs of readers share cases as evenly as the search
finds (exactly evenly where a balanced incomplete block design exists and is found, e.g. 7 readers, 7 cases, r = 3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from random import Random

from vlmalign.review.seeded import digest, generator

Block = tuple[int, ...]

RESTARTS, SWAPS = 4, 2000


def reader_blocks(cases: int, readers: int, per_case: int, seed: int) -> list[Block]:
    """For each case the numbers of its `per_case` readers, ascending.

    Greedy by load and by shared cases, then exchanges that keep loads and lower the sum of squares of shared cases.
    """
    if per_case == readers:
        return [tuple(range(readers))] * cases
    least = _least_squares(cases * per_case * (per_case - 1) // 2, readers * (readers - 1) // 2)
    found: list[tuple[int, list[Block]]] = []
    for restart in range(RESTARTS):
        chance = generator(seed, "readers", restart)
        found.append(_exchanged(_greedy(cases, readers, per_case, chance), readers, chance, least))
        if found[-1][0] == least:
            break
    return min(found, key=lambda one: one[0])[1]


def _least_squares(total: int, pairs: int) -> int:
    """The sum of squares of `pairs` whole numbers that sum to `total` and differ by at most one: no design is below it."""
    low, more = divmod(total, pairs)
    return (pairs - more) * low**2 + more * (low + 1) ** 2


def shared_cases(blocks: Sequence[Block], readers: int) -> Counter[Block]:
    """How many cases each pair of readers has in common."""
    found = Counter(dict.fromkeys(combinations(range(readers), 2), 0))
    for block in blocks:
        found.update(combinations(block, 2))
    return found


def _greedy(cases: int, readers: int, per_case: int, chance: Random) -> list[Block]:
    load, shared = [0] * readers, [[0] * readers for _ in range(readers)]
    blocks = []
    for _ in range(cases):
        block: list[int] = []
        while len(block) < per_case:
            free = [reader for reader in range(readers) if reader not in block]
            keys = {
                reader: (load[reader], sum(shared[reader][other] for other in block), chance.random())
                for reader in free
            }
            block.append(min(free, key=keys.__getitem__))
        for reader in block:
            load[reader] += 1
        for one, other in combinations(block, 2):
            shared[one][other] += 1
            shared[other][one] += 1
        blocks.append(tuple(sorted(block)))
    return blocks


def _exchanged(blocks: list[Block], readers: int, chance: Random, least: int) -> tuple[int, list[Block]]:
    """(sum of squares of shared cases, blocks), once it is `least` or the swaps are used up."""
    shared = [[0] * readers for _ in range(readers)]
    for block in blocks:
        for one, other in combinations(block, 2):
            shared[one][other] += 1
            shared[other][one] += 1
    squares = sum(count**2 for count in shared_cases(blocks, readers).values())
    sets = [set(block) for block in blocks]
    for _ in range(SWAPS if len(sets) > 1 else 0):
        if squares == least:
            break
        first, second = chance.sample(range(len(sets)), 2)
        ours, theirs = sorted(sets[first] - sets[second]), sorted(sets[second] - sets[first])
        if not ours:
            continue
        one, other = chance.choice(ours), chance.choice(theirs)
        rest, far = sets[first] - {one}, sets[second] - {other}
        # Change of the sum of squares when reader `one` goes to the second case and `other` to the first.
        change: Counter[Block] = Counter()
        for reader in rest:
            change[_pair(one, reader)] -= 1
            change[_pair(other, reader)] += 1
        for reader in far:
            change[_pair(other, reader)] -= 1
            change[_pair(one, reader)] += 1
        gain = sum(by * by + 2 * by * shared[a][b] for (a, b), by in change.items())
        if gain <= 0:  # equal ones too: they lead off plateaus
            squares += gain
            for (a, b), by in change.items():
                shared[a][b] += by
                shared[b][a] += by
            sets[first], sets[second] = rest | {other}, far | {one}
    return squares, [tuple(sorted(block)) for block in sets]


def _pair(one: int, other: int) -> Block:
    return (one, other) if one < other else (other, one)


def arm_blocks(cases: Sequence[str], readers: Sequence[Block], arms: int, shown: int, seed: int) -> list[Block]:
    """For each case the slots that it shows, ascending: every combination equally often (by at most one) over all cases,
    and as evenly as can be for every reader.
    """
    combos = list(combinations(range(arms), shown))
    overall: Counter[Block] = Counter()
    by_reader: Counter[tuple[int, Block]] = Counter()
    chosen: list[Block] = []
    for case, block in zip(cases, readers, strict=True):
        least = min(overall[combo] for combo in combos)
        open_ = [combo for combo in combos if overall[combo] == least]
        loads = {combo: sum(by_reader[reader, combo] for reader in block) for combo in open_}
        combo = min(open_, key=lambda combo: (loads[combo], digest(seed, "arms", case, combo)))
        overall[combo] += 1
        by_reader.update((reader, combo) for reader in block)
        chosen.append(combo)
    return chosen
