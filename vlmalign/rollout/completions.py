"""Prompts in, completions out: batches of a few static shapes around the compiled sampling program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from vlmalign.data.groups import round_up
from vlmalign.models.model import Model, Params
from vlmalign.rollout.engine import generate
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Key
from vlmalign.types import Group, Layout


@dataclass(frozen=True)
class Completion:
    """One sampled answer. The stop token is part of it, and counts."""

    tokens: np.ndarray  #: [length] int32
    logp: np.ndarray  #: [length] float32, over the whole vocabulary at the sampling temperature
    kept_logp: np.ndarray  #: [length] float32, the same within the tokens that top-p kept
    stopped: bool  #: False: cut off at the length limit


@dataclass(frozen=True)
class Generator:
    """How to sample: shapes, stop ids and distribution. `rows` prompts run at once, each with `group` completions."""

    model: Model  #: without adapter: rollouts run on base parameters, or on a merged copy
    features: FeatureStore | None
    stop_ids: tuple[int, ...]
    rows: int
    group: int
    completion: int  #: longest completion, tokens
    sampling: Sampling
    multiple: int = 32  #: prompts are padded to a multiple of this many tokens
    images: int = 1  #: images per prompt that a batch has room for

    def run(
        self,
        params: Params,
        prompts: Sequence[Group],
        key: Key[jax.Array, ""],
        *,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[list[Completion]]:
        """`group` completions of every prompt, in order. `advance(n)` is called as prompts are done."""
        done: list[list[Completion]] = []
        for start in range(0, len(prompts), self.rows):
            part = prompts[start : start + self.rows]
            layout = Layout(round_up(max(len(g.prompt) for g in part), self.multiple), 0, 0)
            batch = assemble(part, layout, rows=self.rows, images=self.rows * self.images, features=self.features)
            rollout = jax.device_get(
                generate(
                    self.model,
                    params,
                    batch,
                    key,
                    group=self.group,
                    completion=self.completion,
                    stop_ids=self.stop_ids,
                    sampling=self.sampling,
                    # An array, not a constant of the program: other first samples need no new compilation.
                    first_sample=np.int32(0),
                )
            )
            for row in range(len(part)):
                done.append(
                    [
                        Completion(
                            tokens=rollout.tokens[row, k, : rollout.length[row, k]],
                            logp=rollout.logp[row, k, : rollout.length[row, k]],
                            kept_logp=rollout.kept_logp[row, k, : rollout.length[row, k]],
                            stopped=bool(rollout.stopped[row, k]),
                        )
                        for k in range(self.group)
                    ]
                )
            advance(len(part))
        return done
