"""Ratings on an ordinal scale: cumulative logit (proportional odds) of the arm and the side.

    log odds(level > k) = arm + shown first - threshold_k        (McCullagh, J. R. Stat. Soc. B 42:109, 1980)

fitted by statsmodels' OrderedModel as if all ratings were independent; the errors are the two-way cluster sandwich's, so readers and
cases count as what they are. This is no mixed model: effects are averages over readers and cases.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from vlmalign.review.analysis.ballots import Rating
from vlmalign.review.analysis.pairs import numbered
from vlmalign.review.analysis.sandwich import Estimate, estimate

SIDE = "shown first"
_FURTHEST = 15.0  #: a log odds beyond which an estimate is taken for infinite


def fit_ordinal(ratings: Sequence[Rating], outcome: str, arms: Sequence[str]) -> Estimate:
    """Log odds of a higher level: "arm NAME" against the first arm, and "shown first" where sides differ.

    Raises:
        ValueError: where there is no finite estimate: one level alone, an arm without ratings, arms that levels part.
    """
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    own = [rating for rating in ratings if outcome in rating.levels]
    if without := sorted(set(arms) - {rating.arm for rating in own}):
        raise ValueError(f"no rating of {', '.join(without)}")
    # Levels that were never given have no threshold.
    found, levels = np.unique([rating.levels[outcome] for rating in own], return_inverse=True)
    if len(found) < 2:
        raise ValueError("every rating is the same")
    names = [f"arm {arm}" for arm in arms[1:]]
    x = np.array([[float(rating.arm == arm) for arm in arms[1:]] for rating in own]).reshape(len(own), len(arms) - 1)
    first = np.array([float(rating.side == 0) for rating in own])
    if np.linalg.matrix_rank(np.column_stack([np.ones(len(own)), x, first])) == len(names) + 2:
        names, x = [*names, SIDE], np.column_stack([x, first])
    if not names:
        raise ValueError("one arm on one side: nothing to compare")
    model = OrderedModel(levels, x, distr="logit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence; checked below
        start = np.asarray(model.fit(method="bfgs", disp=0, skip_hessian=True).params)
        if not np.isfinite(start).all() or np.abs(start[: len(names)]).max() > _FURTHEST:
            raise ValueError("no finite estimate: levels part the arms without exception")
        result = model.fit(start_params=start, method="newton", maxiter=20, disp=0, skip_hessian=True)
    params = np.asarray(result.params)
    scores = model.score_obs(params)
    information = -model.hessian(params)
    # What a Newton step would still change, against the error: both are 0 at the maximum.
    step = np.linalg.solve(information, scores.sum(0))
    if not np.abs(step).max() <= 1e-3:  # also where it is not a number
        raise ValueError(f"the fit did not converge: a step of {np.abs(step).max():.2g} is left")
    readers, cases = numbered(rating.reader for rating in own), numbered(rating.case for rating in own)
    where = (np.array([readers[rating.reader] for rating in own]), np.array([cases[rating.case] for rating in own]))
    every = [*names, *(f"threshold {i}" for i in range(1, len(found)))]
    return estimate(every, params, information, scores, *where, float(result.llf))
