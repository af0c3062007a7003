"""Optimiser batches of preference pairs, with the reference's log-probabilities computed once and read ever after.

The reference of an adapter that starts from zero is the base alone; of one that goes on from earlier training, the base
with a frozen copy of that adapter. Either way it never changes, so one pass over the pairs serves every epoch and every
run with the same base, pairs and images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vlmalign.exchange import fetch, gather_from, own_share
from vlmalign.mesh import on_mesh, put_batch
from vlmalign.models.model import Model, Params
from vlmalign.objectives.dpo import DpoSettings, dpo_counts, dpo_loss
from vlmalign.rollout.features import FeatureStore, Pictures
from vlmalign.shapes import Float
from vlmalign.training.loop import Work
from vlmalign.training.reference_cache import ReferenceCache, group_digest, picture_digest, scorer_identity
from vlmalign.training.shared_examples import SharedBatches
from vlmalign.training.step import MicroBatch, Objective, token_scores
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.types import Group, GroupBatch

#: groups -> log-probabilities of their continuations, [K, C] with C the longest one
Recorded = Callable[[Group], Float[np.ndarray, "k c"]]


def preference_objective(settings: DpoSettings, *, recorded: bool, temperature: float = 1.0) -> Objective:
    """The objective of `settings`; `recorded`: the reference comes with the batches, the trainer runs none."""
    return Objective(
        "dpo",
        partial(dpo_loss, settings=settings),
        partial(dpo_counts, settings=settings),
        temperature=temperature,
        needs_reference=settings.needs_reference and not recorded,
        needs_collision=settings.wpo,
    )


def precompute_reference(
    folder: Path,
    groups: Sequence[Group],
    *,
    model: Model,
    params: Params,
    temperature: float,
    shapes: Shapes,
    features: FeatureStore | None = None,
    pictures: Pictures | None = None,
    mesh: Mesh | None = None,
    per_file: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> Recorded:
    """Scores the groups that `folder` does not hold yet, and returns the look-up for all of them.

    Several processes call this together: each reads its share of the images that are told apart, all compute, process 0
    writes.

    Args:
        model, params: the reference: base parameters, with those of a frozen adapter if the model has one.
        features, pictures: for groups with images: their soft tokens, and the prepared images that name them.
        mesh: where `params` live; its devices share the rows of a micro-batch out among them.
        per_file: groups scored between two writes: what a killed run has to do again.
        progress: told (groups done, groups to do) after every micro-batch.
    """
    cache = ReferenceCache(folder, scorer_identity(model, params, temperature=temperature))
    digest = _image_digests(pictures, list(dict.fromkeys(key for group in groups for key in group.images)))
    missing = {name: g for g in groups if (name := group_digest(g, digest)) not in cache}
    score = on_mesh(jax.jit(lambda params, batch: token_scores(model, params, batch, temperature).logp), mesh)
    # Longest first over all: neighbours share a layout, and a batch that does not fit in memory is the first one.
    todo = sorted(missing.items(), key=lambda item: (_longest(item[1]), len(item[1].prompt), item[1].id), reverse=True)
    if features is not None:
        features.expect_share([key for _, group in todo for key in group.images])
    done = 0
    for start in range(0, len(todo), per_file):
        part = todo[start : start + per_file]
        by_id = {group.id: (name, group) for name, group in part}
        assert len(by_id) == len(part), "groups of a data set have ids of their own"
        records = {}
        for batch in micro_batches([group for _, group in part], shapes, features):
            logp = fetch(score(params, put_batch(batch, mesh)))
            rows = [row for row, number in enumerate(batch.group_id) if number >= 0]
            for row in rows:
                name, group = by_id[int(batch.group_id[row])]
                records[name] = _trimmed(logp[row], group)
            done += len(rows)
            if progress is not None:
                progress(done, len(todo))
        cache.fill(records)
    return lambda group: cache.get(group_digest(group, digest))


class PreferenceSource:
    """`batch` pairs per update, each a `Group` of two continuations: chosen, rejected.

    With `reference` (from `precompute_reference`) every micro-batch carries the reference's log-probabilities.
    """

    waits = False

    def __init__(
        self,
        pairs: Sequence[Group],
        *,
        batch: int,
        shapes: Shapes,
        features: FeatureStore | None,
        seed: int,
        reference: Recorded | None,
    ):
        self._shapes, self._features, self._reference = shapes, features, reference
        self._batches = SharedBatches(pairs, batch=batch, features=features, seed=seed)

    def work(self, step: int, params: Params) -> Work:
        del step, params
        groups, readers = next(self._batches)
        by_id = {group.id: group for group in groups}
        batches = [
            MicroBatch(batch, {} if self._reference is None else self._recorded(batch, by_id))
            for batch in micro_batches(groups, self._shapes, self._features, readers)
        ]
        tokens = sum(float(b.groups.weight.sum()) for b in batches)
        return Work(batches, {"loss_tokens": tokens}, ids=list(by_id))

    def observe(self, line: Mapping[str, Any]) -> None:
        del line  # what is learnt from does not follow from what was measured

    def get_state(self) -> dict[str, Any]:
        return {"data": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state["data"])

    def _recorded(self, batch: GroupBatch, by_id: dict[int, Group]) -> dict[str, np.ndarray]:
        assert self._reference is not None
        logp = np.zeros(batch.weight.shape, np.float32)
        for row, number in enumerate(batch.group_id):
            if number >= 0:
                group = by_id[int(number)]
                found = self._reference(group)
                assert found.shape == (len(group.continuations), _longest(group))
                logp[row, :, : found.shape[1]] = found
        return {"ref_logp": logp}


def _longest(group: Group) -> int:
    return max(len(c) for c in group.continuations)


def _trimmed(logp: np.ndarray, group: Group) -> np.ndarray:
    """[K, longest], 0 behind each continuation: what the layout of a batch added is left out."""
    kept = np.arange(_longest(group)) < np.array([[len(c)] for c in group.continuations])
    return np.where(kept, logp[:, : kept.shape[1]], 0.0).astype(np.float32)


def _image_digests(pictures: Pictures | None, keys: Sequence[str]) -> Callable[[str], str]:
    """Digest of the content of each of these images by key; each is read once, in one process."""
    if keys and pictures is None:
        raise ValueError(f"a group holds image {keys[0]}; give the pictures, so that its content can be told")
    found = gather_from(lambda: [picture_digest(pictures.read([key])[0]) for key in own_share(keys)])
    return dict(zip(keys, found, strict=True)).__getitem__
