"""Supervised fine-tuning: the exact token mean of -log p over the whole optimiser batch.

L = sum_t w_t (-log p(y_t)) / sum_t w_t, both sums over all micro-batches and devices. Weights are 1 on assistant
tokens and the turn's stop token, 0 elsewhere, so cutting a batch differently never changes the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vlmalign.types import GroupBatch, LossParts, Scores


def sft_loss(scores: Scores, batch: GroupBatch) -> LossParts:
    """Part "nll": the weighted sum of negative log-likelihoods; metrics over tokens of positive weight."""
    weight = batch.weight
    nll = -jnp.sum(weight * scores.logp)
    real = (weight > 0).astype(jnp.float32)
    count = jnp.sum(real)
    return LossParts(
        sums={"nll": nll},
        metrics=jax.lax.stop_gradient(
            {"loss": (nll, jnp.sum(weight)), "entropy": (jnp.sum(real * scores.entropy), count)}
        ),
    )


def sft_counts(batches: list[GroupBatch]) -> dict[str, float]:
    """What each part of the loss is divided by: the loss tokens of the whole optimiser batch (host arrays)."""
    return {"nll": float(sum(np.sum(b.weight, dtype=np.float64) for b in batches))}
