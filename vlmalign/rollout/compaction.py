"""The few shapes in which decoding runs, and how live completions are packed into a smaller one. NumPy only.

Caches start short and double as completions grow. When no prompt waits any more, rows whose completions have all ended
leave, and the others move together; completions of one prompt stay in one row, where they share its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Bool, Int

#: decode programs of a generator: each takes seconds to compile for a large model
MOST_PROGRAMS = 8
#: tokens of the shortest cache: below this, attention over the own tokens costs nothing beside the prompt's
SHORTEST = 64


class DecodeShape(NamedTuple):
    """What one decode program is compiled for."""

    rows: int
    group: int  #: completions per row
    length: int  #: tokens of each completion's cache


def decode_shapes(
    *, rows: int, group: int, completion: int, steps: int, smaller: int, shares: int = 1, most: int = MOST_PROGRAMS
) -> tuple[DecodeShape, ...]:
    """All rows at growing lengths, then `smaller` halvings of the rows or of the group at the full length.

    Completions of at most `SHORTEST` tokens have no smaller shapes: they are over before a move would pay for itself.
    Lengths are multiples of `steps`, rows of `shares` (devices that cut them); there are at most `most` shapes.

    Raises:
        ValueError: when `smaller` leaves no place for growing lengths among the programs.

    >>> for shape in decode_shapes(rows=8, group=4, completion=500, steps=16, smaller=2):
    ...     print(*shape)
    8 4 64
    8 4 128
    8 4 256
    8 4 512
    4 4 512
    4 2 512
    """
    if not 0 <= smaller < most:
        raise ValueError(f"smaller must lie in 0 .. {most - 1}, found {smaller}")
    room = -(-completion // steps) * steps
    lengths = [min(room, -(-SHORTEST // steps) * steps)]
    while lengths[-1] < room:
        lengths.append(min(room, 2 * lengths[-1]))
    shapes = [DecodeShape(rows, group, length) for length in lengths[-(most - smaller) :]]
    for _ in range(smaller if completion > SHORTEST else 0):
        n, k, length = shapes[-1]
        if n % (2 * shares) == 0 and (n > k or k == 1):
            shapes.append(DecodeShape(n // 2, k, length))
        elif k > 1:
            shapes.append(DecodeShape(n, -(-k // 2), length))
    return tuple(shapes)


def fitting(shapes: Sequence[DecodeShape], *, rows: int, group: int, length: int) -> DecodeShape:
    """The shape of the fewest completions, then the shortest, with room for this many rows, completions and tokens."""
    fit = [s for s in shapes if s.rows >= rows and s.group >= group and s.length >= length]
    assert fit, "the first shapes have room for everything"
    return min(fit, key=lambda s: (s.rows * s.group, s.length))


class Moves(NamedTuple):
    """Which row, and which completions of it, each row of the smaller shape takes over."""

    row: Int[np.ndarray, "n"]
    column: Int[np.ndarray, "n k"]


def packed(live: Bool[np.ndarray, "rows group"], *, rows: int, group: int) -> Moves:
    """Rows with live completions first, in each row the live completions first; otherwise in order.

    >>> packed(np.array([[0, 0], [0, 1], [1, 0]], bool), rows=2, group=1)
    Moves(row=array([1, 2]), column=array([[1],
           [0]]))
    """
    assert (live.any(axis=1)).sum() <= rows
    assert live.sum(axis=1).max(initial=0) <= group
    row = np.argsort(~live.any(axis=1), kind="stable")[:rows]
    column = np.argsort(~live[row], axis=1, kind="stable")[:, :group]
    return Moves(row, column)


def length_classes(
    lengths: Sequence[int], *, rows: int, multiple: int, allowed: Sequence[int] = ()
) -> list[tuple[int, list[int]]]:
    """Prompts that run together: (padded length, which prompts), so that few columns are padding.

    With `allowed`, each prompt takes the shortest length that holds it. Without, classes are cut by halving from the
    longest prompt, each rounded up to `multiple`. A class that would not fill `rows` takes in shorter prompts.

    Raises:
        ValueError: when a prompt is longer than every allowed length.

    >>> length_classes([30, 10, 12, 31], rows=2, multiple=8)
    [(32, [0, 3]), (16, [1, 2])]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    classes: list[tuple[int, list[int]]] = []
    while order:
        longest = lengths[order[0]]
        if allowed:
            wide = min((a for a in allowed if a >= longest), default=0)
            if not wide:
                raise ValueError(
                    f"prompt {order[0]} of this rollout has {longest} tokens, the longest of prompt_lengths is "
                    f"{max(allowed)}; add a length or shorten the prompt"
                )
            floor = max((a for a in allowed if a < longest), default=0)
        else:
            wide = max(1, -(-longest // multiple)) * multiple
            floor = wide // 2
        count = max(sum(lengths[i] > floor for i in order), rows)
        classes.append((wide, sorted(order[:count])))
        order = order[count:]
    return classes


#: a second padded length is taken when it saves this share of what prefilling computes: each has programs of its own,
#: and two lengths leave each other half of `MOST_PROGRAMS`
WORTH_A_LENGTH = 0.25


def prompt_lengths(lengths: Sequence[int], *, multiple: int) -> tuple[int, ...]:
    """The padded lengths, one or two, for prompts whose lengths (tokens) are known; none for no prompts.

    >>> prompt_lengths([30, 31, 10, 33], multiple=8), prompt_lengths([90, 10, 12, 9], multiple=8)
    ((40,), (16, 96))
    """
    if not lengths:
        return ()
    padded = np.sort([max(1, -(-length // multiple)) * multiple for length in lengths])
    longest = int(padded[-1])
    shorter = np.unique(padded)
    # Places saved when all prompts that fit are padded to this length and not to the longest.
    saved = [(longest - size) * np.searchsorted(padded, size, side="right") for size in shorter]
    best = int(np.argmax(saved))
    if saved[best] < WORTH_A_LENGTH * longest * len(padded):
        return (longest,)
    return (int(shorter[best]), longest)
