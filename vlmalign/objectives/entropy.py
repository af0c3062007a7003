"""Entropy on the host: which tokens are the most uncertain ones, and an entropy bonus whose weight adapts.

Only the top share of tokens by entropy may carry the policy term ("Beyond the 80/20 rule", arXiv 2506.01939). Which
tokens those are is a quantile over the *whole* optimiser batch: the trainer scores all micro-batches without a
gradient, `top_entropy_masks` chooses, and the masks travel as `GroupBatch.entropy_mask`. TRL takes the quantile per
micro-batch, so there the chosen tokens depend on how the batch is cut; with one micro-batch the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Float


def top_entropy_masks(entropies: list[np.ndarray], masks: list[np.ndarray], *, share: float) -> list[np.ndarray]:
    """For every micro-batch [N, K, C] the tokens whose entropy is at least the (1 - share) quantile of the optimiser batch.

    `masks` are True on the tokens that count (positive loss weight, truncated completions left out); `share` lies in
    [0, 1], 0 keeping only the highest entropy. The quantile interpolates linearly, in float32 like the entropies.

    >>> entropy = np.array([[[0.1, 0.9, 0.5, 0.7]]], np.float32)
    >>> top_entropy_masks([entropy], [np.array([[[True, True, True, False]]])], share=0.5)[0].tolist()
    [[[False, True, True, False]]]
    """
    if not 0 <= share <= 1:
        raise ValueError(f"the share of top-entropy tokens must lie in [0, 1], found {share}")
    chosen = [np.asarray(e, np.float32)[m] for e, m in zip(entropies, masks, strict=True)]
    every = np.concatenate(chosen) if chosen else np.zeros(0, np.float32)
    if every.size == 0:
        return [np.zeros_like(m, dtype=bool) for m in masks]
    threshold = _quantile(every, 1 - share)
    return [m & (np.asarray(e, np.float32) >= threshold) for e, m in zip(entropies, masks, strict=True)]


def _quantile(x: Float[np.ndarray, "m"], q: float) -> np.float32:
    """Linear interpolation with the rank in float32, as torch has it: a rank that is whole but for rounding decides
    whether the token at the edge is in."""
    ordered = np.sort(x)
    rank = np.float32(q) * np.float32(x.size - 1)
    below = int(np.floor(rank))
    low, high = ordered[below], ordered[min(below + 1, x.size - 1)]
    return low + (rank - np.float32(below)) * (high - low)


@dataclass(frozen=True)
class AdaptiveEntropy:
    """Keeps the mean entropy at `target` nat or above (Skywork-OR1, arXiv 2505.22312).

    The coefficient grows by `step` after an optimiser step whose entropy was at or below the target and shrinks by
    it otherwise, within [low, high]; the bonus is applied only while the last entropy is at or below the target.
    """

    initial: float = 0.0
    target: float = 0.2
    step: float = 0.005
    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high:
            raise ValueError(
                f"bounds of the entropy coefficient must satisfy 0 <= low <= high; found {self.low}, {self.high}"
            )
        if self.step < 0:
            raise ValueError(f"the step of the entropy coefficient must be >= 0, found {self.step}")


class EntropyState(NamedTuple):
    """Plain numbers, so that a checkpoint can hold them."""

    coefficient: float
    last_entropy: float  #: nat, of the last optimiser step; infinite before the first


def init_entropy(settings: AdaptiveEntropy) -> EntropyState:
    return EntropyState(settings.initial, float("inf"))


def update_entropy(entropy: float, state: EntropyState, settings: AdaptiveEntropy) -> EntropyState:
    """After an optimiser step whose mean entropy, over the tokens that carry the policy term, was `entropy`."""
    step = settings.step if entropy <= settings.target else -settings.step
    return EntropyState(min(max(state.coefficient + step, settings.low), settings.high), float(entropy))


def applied_coefficient(state: EntropyState, settings: AdaptiveEntropy) -> float:
    """For `grpo_counts(..., entropy_coef=)` of the next optimiser step."""
    return state.coefficient if state.last_entropy <= settings.target else 0.0
