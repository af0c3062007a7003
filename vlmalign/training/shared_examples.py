"""Batches of examples that the processes of a run read together: each loads its share, all hold the whole.

Which examples a batch has follows from the seed alone, so that any number of processes makes the same batches. Loading
one (its text into tokens, its films into pixels) is work of the process in whose share it lies; its tokens, which are
few, are then told to the others, since micro-batches are cut by the lengths of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vlmalign.data.films.prefetch import Announced
from vlmalign.data.pipeline import Position, shuffled_batches
from vlmalign.distributed import own_share, process_index
from vlmalign.exchange import gather_from
from vlmalign.rollout.features import FeatureStore
from vlmalign.types import Group, Segment


class Batch(NamedTuple):
    """Groups in the order of the shuffle, and which process loaded each of their images."""

    groups: list[Group]
    owners: Mapping[str, int]


class SharedBatches:
    """`batch` groups at a time, for ever, with a position that a checkpoint can hold.

    All processes must take their batches at once. `examples[i]` may do its work lazily; its films are read ahead.

    Raises:
        ValueError: when there are fewer examples than one batch holds; and, in all processes, for a mistake that loading
            an example raises in one.
    """

    def __init__(self, examples: Sequence[Group], *, batch: int, features: FeatureStore | None, seed: int):
        items = examples
        if features is not None:
            items = Announced(examples, films=lambda group: group.images, expect=features.expect)
        self._batches: Position = shuffled_batches(items, batch=batch, seed=seed, share=own_share)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        found = gather_from(lambda: [(process_index(), _packed(group)) for group in next(self._batches)])
        groups = [_unpacked(record) for _, record in found]
        owners: dict[str, int] = {}
        for (process, _), group in zip(found, groups, strict=True):
            for key in group.images:
                owners.setdefault(key, process)
        return Batch(groups, owners)

    def get_state(self) -> dict[str, Any]:
        return self._batches.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state)


def _packed(group: Group) -> list[Any]:
    pieces = [[piece.tokens, piece.image, piece.weight] for piece in (group.prompt, *group.continuations)]
    return [group.id, pieces, list(group.images)]


def _unpacked(record: Sequence[Any]) -> Group:
    number, pieces, images = record
    prompt, *continuations = (Segment(*piece) for piece in pieces)
    return Group(number, prompt, tuple(continuations), tuple(images))
