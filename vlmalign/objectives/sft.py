"""Supervised fine-tuning: the exact token mean of a loss of -log p over the whole optimiser batch.

    nll: L = sum_t w_t (-log p(y_t)) / sum_t w_t
    dft: L = sum_t w_t p(y_t) (-log p(y_t)) / sum_t w_t,  p(y_t) a constant of the gradient (DFT, arXiv 2508.05629)

both sums over all micro-batches and devices, so cutting a batch differently never changes the result. Weights are 1 on
assistant tokens and the turn's stop token and 0 elsewhere; a turn whose tokens weigh 0.5 counts half, above and below.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from vlmalign.objectives.names import require_known
from vlmalign.types import GroupBatch, LossParts, Scores

KINDS = ("nll", "dft")


def sft_loss(scores: Scores, batch: GroupBatch, *, kind: str = "nll") -> LossParts:
    """One part, named as `kind`. Metrics: "loss" is the negative log-likelihood for every kind; entropy over tokens.

    Raises:
        ValueError: for a kind other than "nll" and "dft".
    """
    require_known("kind of supervised loss", kind, KINDS)
    weight = batch.weight
    real = weight > 0
    # Whatever stands on padding must not reach the sum: 0 x inf is NaN for the whole batch.
    logp = jnp.where(real, scores.logp, 0.0)
    nll = -jnp.sum(weight * logp)
    loss = nll if kind == "nll" else -jnp.sum(weight * jax.lax.stop_gradient(jnp.exp(logp)) * logp)
    metrics = {
        "loss": (nll, jnp.sum(weight)),
        "entropy": (jnp.sum(jnp.where(real, scores.entropy, 0.0)), jnp.sum(real.astype(jnp.float32))),
    }
    return LossParts(sums={kind: loss}, metrics=jax.lax.stop_gradient(metrics))


def sft_counts(batches: list[GroupBatch], *, kind: str = "nll") -> dict[str, float]:
    """What the loss is divided by: the weight of all loss tokens of the whole optimiser batch (host arrays)."""
    require_known("kind of supervised loss", kind, KINDS)
    return {kind: float(sum(np.sum(b.weight, dtype=np.float64) for b in batches))}
