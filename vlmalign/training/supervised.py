"""Optimiser batches for SFT: shuffled examples, cut into micro-batches of one layout each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.data.groups import layout_of
from vlmalign.data.pipeline import Position, shuffled_batches
from vlmalign.models.model import Params
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.training.loop import Work
from vlmalign.training.step import MicroBatch
from vlmalign.types import Group, GroupBatch


@dataclass(frozen=True)
class Shapes:
    """How groups become arrays: rows per micro-batch, and the multiples that lengths are rounded up to, in tokens."""

    rows: int
    prompt_multiple: int = 32
    completion_multiple: int = 64
    images: int = 1  #: images per group that a batch has room for


def micro_batches(groups: Sequence[Group], shapes: Shapes, features: FeatureStore | None) -> list[GroupBatch]:
    """The groups, longest first so that neighbours have like lengths, in batches of `shapes.rows`."""
    ordered = sorted(groups, key=lambda g: (-max(len(c) for c in g.continuations), -len(g.prompt), g.id))
    found = []
    for start in range(0, len(ordered), shapes.rows):
        part = ordered[start : start + shapes.rows]
        layout = layout_of(part, prompt_multiple=shapes.prompt_multiple, completion_multiple=shapes.completion_multiple)
        found.append(assemble(part, layout, rows=shapes.rows, images=shapes.rows * shapes.images, features=features))
    return found


class SupervisedSource:
    """`batch` examples per update. `examples[i]` is a `Group` with one continuation; it may do its work lazily."""

    def __init__(
        self, examples: Sequence[Group], *, batch: int, shapes: Shapes, features: FeatureStore | None, seed: int
    ):
        self._shapes, self._features = shapes, features
        self._batches: Position = shuffled_batches(examples, batch=batch, seed=seed)

    def work(self, step: int, params: Params) -> Work:
        del step, params
        groups = next(self._batches)
        batches = [MicroBatch(b, {}) for b in micro_batches(groups, self._shapes, self._features)]
        tokens = sum(float(b.groups.weight.sum()) for b in batches)
        return Work(batches, {"loss_tokens": tokens})

    def get_state(self) -> dict[str, Any]:
        return {"data": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state["data"])
