"""Generalised advantage estimation over the tokens of completions, on the host, before the cut into micro-batches.

Each token is one action. With r_t the reward of a token, V_t the value of the state it was sampled from, and t + 1
the next token that counts (arXiv 1506.02438, eq. 11, 12 and 16):

    delta_t = r_t + gamma V_(t+1) - V_t        A_t = delta_t + gamma lambda A_(t+1)        return_t = A_t + V_t

V and A are 0 after the last token: a completion that was cut at the length limit ends there too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from vlmalign.shapes import Float


class TokenAdvantages(NamedTuple):
    """0 where a token does not count; float32, for `Scores.advantage` and `Scores.returns`."""

    advantage: Float[np.ndarray, "n k c"]
    returns: Float[np.ndarray, "n k c"]


def token_rewards(
    rewards: Float[np.ndarray, "n k"],
    weight: Float[np.ndarray, "n k c"],
    *,
    kl: Float[np.ndarray, "n k c"] | None = None,
    beta: float = 0.0,
) -> Float[np.ndarray, "n k c"]:
    """The completion's reward on its last token that counts, less beta KL_t (`kl.kl_per_token`) on every one.

    Raises:
        ValueError: a completion that counts has no finite reward: give it weight 0 first.
    """
    real = np.asarray(weight) > 0
    some = real.any(axis=-1)
    unscored = some & ~np.isfinite(rewards)
    if unscored.any():
        n, k = np.argwhere(unscored)[0]
        raise ValueError(
            f"completion {k} of row {n} has tokens to learn from and no reward; give those that could not be scored "
            "weight 0 before advantages are estimated"
        )
    if beta < 0:
        raise ValueError(f"beta must be >= 0, found {beta}; a negative one rewards leaving the reference")
    found = np.zeros(real.shape, np.float64) if kl is None else np.where(real, -beta * kl, 0.0)
    last = real.shape[-1] - 1 - np.argmax(real[..., ::-1], axis=-1)
    n, k = np.nonzero(some)
    found[n, k, last[n, k]] += np.asarray(rewards, np.float64)[n, k]
    return found


def estimate_advantages(
    rewards: Float[np.ndarray, "n k c"],
    values: Float[np.ndarray, "n k c"],
    weight: Float[np.ndarray, "n k c"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> TokenAdvantages:
    """GAE(lambda) of `token_rewards` and recorded values; tokens of weight 0 are stepped over.

    gamma = 1 is usual for text. lambda = 1 gives A_t = reward to go - V_t; lambda = 0 gives delta_t.
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lambda must lie in [0, 1], found {gamma} and {lam}")
    real = np.asarray(weight) > 0
    v = np.where(real, np.asarray(values, np.float64), 0.0)
    r = np.where(real, np.asarray(rewards, np.float64), 0.0)
    advantage = np.zeros(real.shape, np.float64)
    next_value, next_advantage = np.zeros(real.shape[:2]), np.zeros(real.shape[:2])
    for t in reversed(range(real.shape[-1])):
        here = real[..., t]
        found = r[..., t] + gamma * next_value - v[..., t] + gamma * lam * next_advantage
        advantage[..., t] = np.where(here, found, 0.0)
        next_value = np.where(here, v[..., t], next_value)
        next_advantage = np.where(here, found, next_advantage)
    return TokenAdvantages(advantage.astype(np.float32), (advantage + v).astype(np.float32))


def whiten(advantages: list[np.ndarray], weights: list[np.ndarray]) -> list[np.ndarray]:
    """(A - mean) / sqrt(var + 1e-8) over the tokens of the whole optimiser batch (Bessel's variance), 0 elsewhere.

    One [N, K, C] array per micro-batch, of advantages and of loss weights.
    """
    every = np.concatenate(
        [np.asarray(a, np.float64)[np.asarray(w) > 0] for a, w in zip(advantages, weights, strict=True)]
    )
    if every.size < 2:
        raise ValueError(f"whitening needs at least 2 tokens in the optimiser batch, found {every.size}")
    mean, scale = every.mean(), np.sqrt(every.var(ddof=1) + 1e-8)
    return [
        np.where(np.asarray(w) > 0, (np.asarray(a, np.float64) - mean) / scale, 0.0).astype(np.float32)
        for a, w in zip(advantages, weights, strict=True)
    ]
