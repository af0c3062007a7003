"""Rollouts as micro-batches: what sampling recorded goes onto the rows, and numbers by group travel there and back.

An optimiser batch numbers its groups 0, 1, ... in the order of its rollouts; rows are in whatever order and cut the
micro-batches took, with padding rows of id -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vlmalign.rollout.completions import Completion
from vlmalign.rollout.features import FeatureStore
from vlmalign.shapes import Float
from vlmalign.training.rollouts import Rollout
from vlmalign.training.step import MicroBatch
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.types import GroupBatch, Segment


def rollout_batches(rollouts: Sequence[Rollout], shapes: Shapes, features: FeatureStore | None) -> list[MicroBatch]:
    """The completions as continuations of their prompts, every token a loss token."""
    # Numbered anew: dynamic sampling may bring the same prompt twice.
    groups = [
        replace(r.task.prompt, id=i, continuations=tuple(map(_segment, r.completions))) for i, r in enumerate(rollouts)
    ]
    return [_recorded(batch, rollouts) for batch in micro_batches(groups, shapes, features)]


def record(batch: MicroBatch, **found: Float[np.ndarray, "n k c"]) -> MicroBatch:
    """The micro-batch with more numbers recorded about its tokens, by `Scores` field."""
    return batch._replace(recorded={**batch.recorded, **found})


def by_row(batch: MicroBatch, values: Float[np.ndarray, "groups k"]) -> Float[np.ndarray, "n k"]:
    """Numbers by completion for the rows of a micro-batch; NaN in padding rows."""
    ids = batch.groups.group_id
    return np.where((ids >= 0)[:, None], values[np.maximum(ids, 0)], np.nan)


def by_group(
    batches: Sequence[MicroBatch], rows: Sequence[Float[np.ndarray, "_ k"]], groups: int
) -> Float[np.ndarray, "groups k"]:
    """The inverse of `by_row` over all micro-batches of `groups` groups."""
    found = np.full((groups, rows[0].shape[1]), np.nan)
    for batch, values in zip(batches, rows, strict=True):
        real = batch.groups.group_id >= 0
        found[batch.groups.group_id[real]] = values[real]
    return found


def with_advantage(batch: MicroBatch, advantages: Float[np.ndarray, "groups k"]) -> MicroBatch:
    """The micro-batch with one advantage per completion, 0 in padding rows."""
    own = np.nan_to_num(by_row(batch, advantages)).astype(np.float32)
    return batch._replace(groups=batch.groups._replace(advantage=own))


def _segment(completion: Completion) -> Segment:
    tokens = completion.tokens.astype(np.int32)
    return Segment(tokens, np.full(tokens.shape, -1, np.int32), np.ones(tokens.shape, np.float32))


def _recorded(batch: GroupBatch, rollouts: Sequence[Rollout]) -> MicroBatch:
    """With log-probabilities as sampled, and which completions were cut off at the length limit."""
    rows, group, _ = batch.weight.shape
    truncated = np.zeros((rows, group), bool)
    found = {name: np.zeros(batch.weight.shape, np.float32) for name in ("rollout_logp", "kept_logp")}
    for row, number in enumerate(batch.group_id):
        if number >= 0:
            for k, completion in enumerate(rollouts[int(number)].completions):
                truncated[row, k] = not completion.stopped
                found["rollout_logp"][row, k, : len(completion.logp)] = completion.logp
                found["kept_logp"][row, k, : len(completion.kept_logp)] = completion.kept_logp
    return MicroBatch(batch._replace(truncated=truncated), found)
