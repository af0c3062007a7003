"""Bradley-Terry with ties, by maximum likelihood.

A comparison of the arm shown first (i) and the arm shown second (j) has the results win, tie, loss with

    P = softmax(eta / 2, theta, -eta / 2),   eta = a_i - a_j + side + length * x1 + formatting * x2

which is the model of Davidson (J. Am. Stat. Assoc. 65:317, 1970, eq. 3.1) with nu = exp(theta), strengths exp(a) and, after
Davidson and Beaver (Biometrics 33:693, 1977), an effect of order. x1 and x2 are differences in length and formatting in
doublings (pairs.py), as votes of clinicians follow style. Without a tie theta is left out: then it is Bradley and Terry's
model, a logistic regression on differences. The first arm is the reference, a = 0. The log-likelihood is concave, so
Newton's method finds its only maximum.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components

from vlmalign.review.analysis.pairs import LOSS, TIED, WIN, Pairs
from vlmalign.review.analysis.sandwich import Estimate, estimate

SIDE, TIE = "shown first", "tie"
STYLE = ("length", "formatting")
_FURTHEST = 15.0  #: a log odds beyond which an estimate is taken for infinite


def fit(compared: Pairs, arms: Sequence[str], *, style: Sequence[str] = ()) -> Estimate:
    """The estimate of log strengths ("arm NAME"), side, tie and style: differences in log odds.

    Raises:
        ValueError: where no finite maximum exists (an arm that never lost, or never met the others), or where style cannot be
            told from arms and side.
    """
    _check_connected(compared, arms)
    names = [*(f"arm {arm}" for arm in arms[1:]), SIDE, *style]
    x = _differences(compared, len(arms), style)
    if np.linalg.matrix_rank(x) < x.shape[1]:
        raise ValueError(
            f"{', '.join(style) or 'the side'} cannot be told from the arms: no variation is left beside them"
        )
    # Features of the three results, in the order of WIN, TIED, LOSS: [3, n, k].
    features = np.stack([x / 2, np.zeros_like(x), -x / 2])
    kept = [WIN, TIED, LOSS]
    if (compared.result == TIED).any():
        mark = np.zeros((3, len(x), 1))
        mark[TIED] = 1.0
        features = np.concatenate([features, mark], axis=2)
        names.append(TIE)
    else:
        kept.remove(TIED)
    given = features[compared.result, np.arange(len(x))]
    features = features[kept]
    values = np.zeros(features.shape[2])
    for _ in range(60):
        scores, information, loglikelihood = _derivatives(features, given, values)
        step = np.linalg.solve(information, scores.sum(0))
        values = values + step * min(1.0, 4.0 / np.abs(step).max(initial=1e-12))
        if np.abs(values).max() > _FURTHEST:
            worst = names[int(np.abs(values).argmax())]
            raise ValueError(
                f"no finite estimate: {worst} parts wins from losses without exception; more votes are needed"
            )
        if np.abs(step).max() < 1e-10:
            break
    scores, information, loglikelihood = _derivatives(features, given, values)
    return estimate(names, values, information, scores, compared.reader, compared.case, loglikelihood)


def _derivatives(features: np.ndarray, given: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(scores [n, k], observed information [k, k], log-likelihood)."""
    logits = features @ values  # [results, n]
    top = logits.max(0)
    total = np.exp(logits - top).sum(0)
    p = np.exp(logits - top) / total
    mean = np.einsum("rn,rnk->nk", p, features)
    information = np.einsum("rn,rnk,rnl->kl", p, features, features, optimize=True) - mean.T @ mean
    return given - mean, information, float((given @ values - top - np.log(total)).sum())


def _differences(compared: Pairs, arms: int, style: Sequence[str]) -> np.ndarray:
    """[n, arms - 1 + 1 + style]"""
    one_hot = np.eye(arms)
    strengths = (one_hot[compared.first] - one_hot[compared.second])[:, 1:]
    return np.column_stack([strengths, np.ones(len(strengths)), *(getattr(compared, name) for name in style)])


def _check_connected(compared: Pairs, arms: Sequence[str]) -> None:
    """Ford (Am. Math. Mon. 64:28, 1957): a maximum exists if in every split of the arms each part has won against the other."""
    won = np.zeros((len(arms), len(arms)))
    won[compared.first[compared.result != LOSS], compared.second[compared.result != LOSS]] = 1
    won[compared.second[compared.result != WIN], compared.first[compared.result != WIN]] = 1
    parts, part = connected_components(csr_matrix(won), connection="strong")
    if parts > 1:
        words = " | ".join(
            ", ".join(arm for arm, own in zip(arms, part, strict=True) if own == i) for i in range(parts)
        )
        raise ValueError(
            f"no finite estimate: one part of the arms never won against, or never met, the other: {words}"
        )
    if (compared.result == TIED).all():
        raise ValueError("no finite estimate: every comparison is a tie")
