"""Estimates of KL(policy || reference) from the tokens that were sampled, for the loss or for the reward.

With d = ref_logp - logp of a sampled token (Schulman, "Approximating KL divergence", 2020):

    k1 = -d                 unbiased, any sign
    k2 = d^2 / 2            biased, never negative
    k3 = exp(d) - d - 1     unbiased, never negative

As a term of the loss, k1 has zero expected gradient on-policy unless it is multiplied by the differentiable ratio
(`GrpoSettings.kl_unbiased`), and k3's gradient is that of the forward KL, biased for the reverse one; multiplied by
the ratio both are unbiased (DeepSeek-V3.2, arXiv 2512.02556). In the reward any of them needs no gradient.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from vlmalign.objectives.names import require_known
from vlmalign.shapes import Float

ESTIMATORS = ("k1", "k2", "k3")

#: exponents past this are held there: float32 overflows at 88, and infinity times a mask of 0 is not a number
LARGEST_EXPONENT = 80.0


def kl_estimate(gap: Any, kind: str, *, xp: Any = jnp) -> Any:
    """The estimate for each token from `gap` = ref_logp - logp, nat; `xp` is the array namespace, JAX's or NumPy's.

    >>> [round(float(kl_estimate(np.float64(0.5), kind, xp=np)), 4) for kind in ESTIMATORS]
    [-0.5, 0.125, 0.1487]
    """
    require_known("KL estimator", kind, ESTIMATORS)
    if kind == "k1":
        return -gap
    if kind == "k2":
        return gap**2 / 2
    return xp.exp(xp.minimum(gap, LARGEST_EXPONENT)) - gap - 1


def kl_per_token(
    logp: Float[np.ndarray, "n k c"],
    ref_logp: Float[np.ndarray, "n k c"],
    weight: Float[np.ndarray, "n k c"],
    *,
    kind: str = "k1",
) -> Float[np.ndarray, "n k c"]:
    """The estimate at every token of positive weight and 0 elsewhere, on the host, in float64."""
    gap = np.where(weight > 0, np.float64(1) * ref_logp - logp, 0.0)
    return kl_estimate(gap, kind, xp=np)


def rewards_less_kl(
    rewards: Float[np.ndarray, "n k"], kl: Float[np.ndarray, "n k c"], *, beta: float
) -> Float[np.ndarray, "n k"]:
    """r - beta sum_t kl_t: the penalty as part of each completion's reward (as in RLOO, arXiv 2402.14740).

    `kl` is `kl_per_token` of the policy that sampled. NaN rewards (not scored) stay NaN.

    >>> rewards_less_kl(np.array([[1.0, 0.0]]), np.array([[[0.1, 0.1], [0.5, 0.0]]]), beta=0.5).tolist()
    [[0.9, -0.25]]
    """
    if beta < 0:
        raise ValueError(f"beta must be >= 0, found {beta}; a negative one rewards leaving the reference")
    return np.asarray(rewards, np.float64) - beta * kl.sum(axis=-1)
