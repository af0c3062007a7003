"""Shuffled, repeated batches of examples with a position that a checkpoint can hold (grain)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import grain

Item = TypeVar("Item")


@runtime_checkable
class Position(Protocol):
    """An endless iterator of batches whose place can be saved as JSON and set again."""

    def __iter__(self) -> Iterator[list[Any]]: ...
    def __next__(self) -> list[Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def shuffled_batches(
    items: Sequence[Item],
    *,
    batch: int,
    seed: int,
    threads: int = 1,
    ahead: int = 2,
    share: Callable[[list[int]], Sequence[int]] = list,
) -> Position:
    """Batches of `batch` items for ever, a new shuffle every pass, the same sequence for the same seed.

    What does not fill a last batch is left out of that pass, so no batch holds an item twice.

    `items[i]` may do work (tokenise, decode): it runs on `threads` threads, `ahead` batches ahead of the consumer.
    Of a batch only the items are taken whose indices `share` returns of all: with `distributed.own_share`, those of this
    process.

    Raises:
        ValueError: when there are fewer items than one batch holds.
    """
    if len(items) < batch:
        raise ValueError(f"a batch of {batch} needs at least as many examples, found {len(items)}")
    numbers = grain.MapDataset.source(range(len(items))).seed(seed).shuffle()
    batches = numbers.batch(batch, drop_remainder=True, batch_fn=list)
    dataset = batches.map(lambda indices: [items[index] for index in share(indices)]).repeat()
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)))
