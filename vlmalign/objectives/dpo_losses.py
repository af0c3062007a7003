"""The formulas of preference optimisation: one function per loss, of what is known about a pair of completions.

For a prompt with a chosen and a rejected completion y_c, y_r and a policy p with reference q:

    c = log p(y_c) - log q(y_c),   r = log p(y_r) - log q(y_r)        summed over the completion's tokens, natural log
    s_c = f'(e^c), s_r = f'(e^r)   for an f-divergence between p and q; s = c, r for the reverse KL (plain DPO)

Every loss is a sum over pairs, so that cutting a batch differently never changes it. Two of TRL's are therefore not
here: `aot` and `aot_unpaired` sort the log-ratios of one micro-batch, so what they compute depends on the cut. Neither
is BCO's running mean of rewards (`bco_pair` goes without it, as in TRL).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Float

#: exponents are cut here: e^80 is near the end of float32, and inf - inf between two of them would be NaN
_MOST = 80.0


class Pairs(NamedTuple):
    """What is known about N pairs: [N] float32 each."""

    chosen: Array  #: c; the log-probability itself where no reference is used
    rejected: Array  #: r
    chosen_score: Array  #: s_c
    rejected_score: Array  #: s_r
    chosen_length: Array  #: tokens, at least 1
    rejected_length: Array
    chosen_logp: Array  #: log p(y_c)
    rejected_logp: Array


class Constants(NamedTuple):
    """The scalars of the formulas."""

    beta: float
    smoothing: float  #: epsilon: the share of labels taken to be flipped
    margin: float  #: gamma of SimPO
    tau: float  #: of DiscoPOP


def _smoothed(x: Array, smoothing: float) -> Array:
    return -(1 - smoothing) * jax.nn.log_sigmoid(x) - smoothing * jax.nn.log_sigmoid(-x)


def _score_gap(pairs: Pairs) -> Array:
    return pairs.chosen_score - pairs.rejected_score


def _mean_score_gap(pairs: Pairs) -> Array:
    return pairs.chosen_score / pairs.chosen_length - pairs.rejected_score / pairs.rejected_length


def _mean_logps(pairs: Pairs) -> tuple[Array, Array]:
    return pairs.chosen_logp / pairs.chosen_length, pairs.rejected_logp / pairs.rejected_length


def sigmoid(pairs: Pairs, k: Constants) -> Array:
    """-(1-eps) log sig(beta (s_c - s_r)) - eps log sig(-beta (s_c - s_r)): DPO (arXiv 2305.18290, eq. 7), and with
    eps > 0 cDPO (Mitchell 2023). TRL's `sigmoid` passes over eps in silence."""
    return _smoothed(k.beta * _score_gap(pairs), k.smoothing)


def sigmoid_norm(pairs: Pairs, k: Constants) -> Array:
    """`sigmoid` of scores per token: length-normalised DPO (Tulu 3, arXiv 2411.15124)."""
    return _smoothed(k.beta * _mean_score_gap(pairs), k.smoothing)


def hinge(pairs: Pairs, k: Constants) -> Array:
    """max(0, 1 - beta (s_c - s_r)): SLiC's loss with DPO's reward (RSO, arXiv 2309.06657)."""
    return jax.nn.relu(1 - k.beta * _score_gap(pairs))


def ipo(pairs: Pairs, k: Constants) -> Array:
    """(s_c/|y_c| - s_r/|y_r| - 1/(2 beta))^2 (arXiv 2310.12036, eq. 17; per token, as its authors ran it)."""
    return (_mean_score_gap(pairs) - 1 / (2 * k.beta)) ** 2


def robust(pairs: Pairs, k: Constants) -> Array:
    """An unbiased estimate of DPO's loss when a share eps of the labels is flipped (arXiv 2403.00409)."""
    x = k.beta * _score_gap(pairs)
    clean, flipped = -jax.nn.log_sigmoid(x), -jax.nn.log_sigmoid(-x)
    return ((1 - k.smoothing) * clean - k.smoothing * flipped) / (1 - 2 * k.smoothing)


def exo_pair(pairs: Pairs, k: Constants) -> Array:
    """KL of the policy's preference to (1-eps, eps) (EXO, arXiv 2402.00856, eq. 16)."""
    x = k.beta * _score_gap(pairs)
    won = jax.nn.sigmoid(x) * (jax.nn.log_sigmoid(x) - math.log1p(-k.smoothing))
    lost = jax.nn.sigmoid(-x) * (jax.nn.log_sigmoid(-x) - math.log(k.smoothing))
    return won + lost


def discopop(pairs: Pairs, k: Constants) -> Array:
    """Logistic and exponential loss blended by sig(x/tau), x = beta (s_c - s_r) (arXiv 2406.08414, eq. 5).

    The product sig(x/tau) e^-x is taken in logarithms: apart, 0 x inf would be NaN from x = -89 on.
    """
    x = k.beta * _score_gap(pairs)
    exponential = jnp.exp(jax.nn.log_sigmoid(x / k.tau) - x)
    return -jax.nn.sigmoid(-x / k.tau) * jax.nn.log_sigmoid(x) + exponential


def nca_pair(pairs: Pairs, k: Constants) -> Array:
    """-log sig(beta c) - 1/2 log sig(-beta c) - 1/2 log sig(-beta r) (NCA, arXiv 2402.05369, K = 2)."""
    c, r = k.beta * pairs.chosen, k.beta * pairs.rejected
    return -jax.nn.log_sigmoid(c) - 0.5 * (jax.nn.log_sigmoid(-c) + jax.nn.log_sigmoid(-r))


def bco_pair(pairs: Pairs, k: Constants) -> Array:
    """-log sig(beta c) - log sig(-beta r) (BCO, arXiv 2404.04656, on pairs and without its reward shift)."""
    return -jax.nn.log_sigmoid(k.beta * pairs.chosen) - jax.nn.log_sigmoid(-k.beta * pairs.rejected)


def sppo_hard(pairs: Pairs, k: Constants) -> Array:
    """(c - 1/(2 beta))^2 + (r + 1/(2 beta))^2 (SPPO, arXiv 2405.00675, eq. 4.7 with win probabilities 1 and 0)."""
    return (pairs.chosen - 0.5 / k.beta) ** 2 + (pairs.rejected + 0.5 / k.beta) ** 2


def apo_zero(pairs: Pairs, k: Constants) -> Array:
    """1 - sig(beta c) + sig(beta r): chosen up, rejected down (APO, arXiv 2408.06266, eq. 7)."""
    return jax.nn.sigmoid(-k.beta * pairs.chosen) + jax.nn.sigmoid(k.beta * pairs.rejected)


def apo_down(pairs: Pairs, k: Constants) -> Array:
    """sig(beta c) + 1 - sig(beta (c - r)): both down, rejected further (APO, arXiv 2408.06266, eq. 8)."""
    return jax.nn.sigmoid(k.beta * pairs.chosen) + jax.nn.sigmoid(-k.beta * (pairs.chosen - pairs.rejected))


def simpo(pairs: Pairs, k: Constants) -> Array:
    """-log sig(beta (log p(y_c)/|y_c| - log p(y_r)/|y_r|) - gamma), smoothed (SimPO, arXiv 2405.14734, eq. 6)."""
    c, r = _mean_logps(pairs)
    return _smoothed(k.beta * (c - r) - k.margin, k.smoothing)


def orpo(pairs: Pairs, k: Constants) -> Array:
    """-beta log sig(log odds ratio) of p = exp(mean log-probability); ORPO is this plus `sft` (arXiv 2403.07691, eq. 7).

    TRL takes ORPO's `sft` over prompt and answer; here, as for every loss, the prompt is no label.
    """
    c, r = _mean_logps(pairs)
    return -k.beta * jax.nn.log_sigmoid((c - r) - (_log1mexp(c) - _log1mexp(r)))


def _log1mexp(x: Array) -> Array:
    """log(1 - e^x) for x < 0, by the branch that does not cancel."""
    # A completion of probability 1 has infinite odds: it counts as 1 - 1e-7. The branch not taken must be finite too,
    # or its gradient times 0 is NaN.
    x = jnp.minimum(x, -1e-7)
    small = x < -math.log(2.0)
    far, near = jnp.where(small, x, -1.0), jnp.where(small, -0.5, x)
    return jnp.where(small, jnp.log1p(-jnp.exp(far)), jnp.log(-jnp.expm1(near)))


class PairLoss(NamedTuple):
    """A loss per pair, and what it may be combined with."""

    loss: Callable[[Pairs, Constants], Array]
    of_gap: bool = False  #: sees scores by their difference only: another f-divergence may be used
    smooths: bool = False  #: takes label_smoothing
    reference: bool = True  #: needs reference log-probabilities
    per_token: bool = False  #: its implicit reward is beta times the mean, not the sum, of log-probabilities


#: name in a configuration -> loss
PAIR_LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid, of_gap=True, smooths=True),
    "sigmoid_norm": PairLoss(sigmoid_norm, of_gap=True, smooths=True),
    "hinge": PairLoss(hinge, of_gap=True),
    "ipo": PairLoss(ipo, of_gap=True),
    "robust": PairLoss(robust, of_gap=True, smooths=True),
    "exo_pair": PairLoss(exo_pair, of_gap=True, smooths=True),
    "discopop": PairLoss(discopop, of_gap=True),
    "nca_pair": PairLoss(nca_pair),
    "bco_pair": PairLoss(bco_pair),
    "sppo_hard": PairLoss(sppo_hard),
    "apo_zero": PairLoss(apo_zero),
    "apo_down": PairLoss(apo_down),
    "simpo": PairLoss(simpo, smooths=True, reference=False, per_token=True),
    "orpo": PairLoss(orpo, reference=False, per_token=True),
}


def _reverse_kl(x: Array, alpha: float) -> Array:
    del alpha
    return x


def _forward_kl(x: Array, alpha: float) -> Array:
    del alpha
    return 1 - jnp.exp(jnp.minimum(-x, _MOST))


def _js(x: Array, alpha: float) -> Array:
    del alpha
    return math.log(2.0) + jax.nn.log_sigmoid(x)


def _alpha(x: Array, alpha: float) -> Array:
    if abs(alpha - 1) < 1e-6:
        return x
    return (jnp.exp(jnp.minimum((alpha - 1) * x, _MOST)) - 1) / (alpha - 1)


#: name -> f'(t) at log t, f-DPO (arXiv 2309.16240); the exponents of two are cut at 80 (TRL cuts one of them)
DIVERGENCES: dict[str, Callable[[Array, float], Array]] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "js_divergence": _js,
    "alpha_divergence": _alpha,
}


def divergence_score(ratio: Float[Array, "n"], *, name: str, alpha: float) -> Float[Array, "n"]:
    """f'(e^ratio): log t (reverse KL), 1 - 1/t (forward), log(2t/(1+t)) (Jensen-Shannon), (t^(a-1) - 1)/(a-1).

    >>> round(float(divergence_score(jnp.zeros(1), name="js_divergence", alpha=0.5)[0]), 6)
    0.0
    """
    return DIVERGENCES[name](ratio, alpha)
