"""Optimiser batches for SFT: shuffled examples, cut into micro-batches of one layout each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmalign.data.groups import layout_of
from vlmalign.models.model import Params
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.training.loop import Work
from vlmalign.training.shared_examples import SharedBatches
from vlmalign.training.step import MicroBatch
from vlmalign.types import Group, GroupBatch, Layout


@dataclass(frozen=True)
class Shapes:
    """How groups become arrays: rows per micro-batch, and the multiples that lengths are rounded up to, in tokens.

    With a budget of `tokens`, long rows are fewer: the largest power of two of them that fits, in equal parts for
    all devices, and at least one for each.
    """

    rows: int
    tokens: int | None = None
    prompt_multiple: int = 32
    completion_multiple: int = 64
    images: int = 1  #: images per group that a batch has room for
    shares: int = 1  #: devices that share the rows of a micro-batch out among them: `mesh.row_shares`

    def __post_init__(self) -> None:
        if self.rows % self.shares:
            raise ValueError(
                f"{self.rows} rows of a micro-batch cannot be shared out to {self.shares} devices; make rows a multiple "
                f"of {self.shares}"
            )

    def layout(self, groups: Sequence[Group]) -> Layout:
        """The smallest layout in whole multiples that holds the groups."""
        return layout_of(groups, prompt_multiple=self.prompt_multiple, completion_multiple=self.completion_multiple)

    def rows_of(self, layout: Layout) -> int:
        """Rows of a micro-batch of this layout."""
        if self.tokens is None:
            return self.rows
        power = 1 << max(0, (self.tokens // layout.row).bit_length() - 1)
        return min(self.rows, max(1, power // self.shares) * self.shares)


def micro_batches(
    groups: Sequence[Group], shapes: Shapes, features: FeatureStore | None, readers: Mapping[str, int] = {}
) -> list[GroupBatch]:
    """The groups, longest first so that neighbours have like lengths, in batches of at most `shapes.rows`.

    All processes make the same batches at once; each encodes its part of their images, those first that `readers` says
    it has read (`FeatureStore.share`).
    """
    if features is not None:
        features.share([key for group in groups for key in group.images], readers)
    waiting = sorted(groups, key=lambda g: (-max(len(c) for c in g.continuations), -len(g.prompt), g.id))
    found = []
    while waiting:
        part = waiting[: shapes.rows]
        while len(part) > (rows := shapes.rows_of(shapes.layout(part))):
            part = part[:rows]
        waiting = waiting[len(part) :]
        layout = shapes.layout(part)
        found.append(assemble(part, layout, rows=rows, images=rows * shapes.images, features=features))
    return found


class SupervisedSource:
    """`batch` examples per update. `examples[i]` is a `Group` with one continuation; it may do its work lazily."""

    waits = False

    def __init__(
        self, examples: Sequence[Group], *, batch: int, shapes: Shapes, features: FeatureStore | None, seed: int
    ):
        self._shapes, self._features = shapes, features
        self._batches = SharedBatches(examples, batch=batch, features=features, seed=seed)

    def work(self, step: int, params: Params) -> Work:
        del step, params
        groups, readers = next(self._batches)
        batches = [MicroBatch(b, {}) for b in micro_batches(groups, self._shapes, self._features, readers)]
        tokens = sum(float(b.groups.weight.sum()) for b in batches)
        return Work(batches, {"loss_tokens": tokens}, ids=[group.id for group in groups])

    def observe(self, line: Mapping[str, Any]) -> None:
        del line  # what is learnt from does not follow from what was measured

    def get_state(self) -> dict[str, Any]:
        return {"data": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state["data"])
