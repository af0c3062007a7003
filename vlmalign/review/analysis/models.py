"""The models that an analysis fits, as rows of tables: every pair of arms, what else moves votes, and what could not be fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

from vlmalign.review.analysis import davidson
from vlmalign.review.analysis.averages import (
    UNITS,
    Paired,
    holm,
    paired_tests,
    preference_differences,
    rating_differences,
)
from vlmalign.review.analysis.ballots import Ballot, Gathered
from vlmalign.review.analysis.ordinal import fit_ordinal
from vlmalign.review.analysis.pairs import Pairs, pairs
from vlmalign.review.analysis.sandwich import Estimate
from vlmalign.review.form import NONE

Row = dict[str, Any]
PREFERENCE = "preference"


def preference_models(gathered: Gathered, compared: Pairs) -> list[Row]:
    """Davidson's model: unadjusted, adjusted for style, and on fewer ballots, to see what hangs on them."""
    style = [name for name in davidson.STYLE if getattr(compared, name).any()]
    found = [_davidson("unadjusted", gathered, gathered.ballots)]
    if style:
        found.append(_davidson(f"adjusted for {' and '.join(style)}", gathered, gathered.ballots, style))
    fewer: list[tuple[str, Callable[[Ballot], bool]]] = [
        ("without pages on which none is acceptable", lambda ballot: ballot.choice != NONE),
        ("without pages that show the reader's own answer", lambda ballot: not ballot.own),
    ]
    for name, keep in fewer:
        kept = [ballot for ballot in gathered.ballots if keep(ballot)]
        if 0 < len(kept) < len(gathered.ballots):
            found.append(_davidson(name, gathered, kept))
    return found


def _davidson(name: str, gathered: Gathered, ballots: Sequence[Ballot], style: Sequence[str] = ()) -> Row:
    try:
        fitted = davidson.fit(pairs(ballots, gathered.arms, gathered.style), gathered.arms, style=style)
    except ValueError as problem:
        return {"name": name, "ballots": len(ballots), "problem": str(problem), "arms": [], "others": []}
    rows = arm_effects(fitted, gathered.arms)
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    others = [{"name": other, **fitted.effect({other: 1})._asdict()} for other in (davidson.SIDE, *style)]
    tie = fitted.values[fitted.names.index(davidson.TIE)] if davidson.TIE in fitted.names else None
    return {
        "name": name,
        "ballots": len(ballots),
        "comparisons": fitted.n,
        "df": fitted.df,
        "loglikelihood": fitted.loglikelihood,
        "problem": None,
        "arms": rows,
        "others": others,
        "tie": None if tie is None else float(tie),
    }


def rating_models(gathered: Gathered) -> list[Row]:
    """The cumulative logit of every outcome; p-values of all of them are adjusted together."""
    found = []
    for outcome in gathered.outcomes:
        row: Row = {**vars(outcome), "problem": None, "arms": [], "others": []}
        try:
            fitted = fit_ordinal(gathered.ratings, outcome.key, gathered.arms)
        except ValueError as problem:
            row["problem"] = str(problem)
        else:
            row |= {"n": fitted.n, "df": fitted.df, "arms": arm_effects(fitted, gathered.arms)}
            if davidson.SIDE in fitted.names:
                row["others"] = [{"name": davidson.SIDE, **fitted.effect({davidson.SIDE: 1})._asdict()}]
        found.append(row)
    effects = [effect for row in found for effect in row["arms"]]
    for effect, p in zip(effects, holm([effect["p"] for effect in effects]), strict=True):
        effect["p_holm"] = p
    return found


def arm_effects(fitted: Estimate, arms: Sequence[str]) -> list[Row]:
    """Log odds of each arm against each later one, in the order of `arms`."""
    return [
        {"arm": arm, "other": other, **fitted.effect({f"arm {arm}": 1, f"arm {other}": -1})._asdict()}
        for arm, other in combinations(arms, 2)
    ]


def average_tests(gathered: Gathered, compared: Pairs) -> list[Row]:
    """Wilcoxon and sign tests of every outcome and pair of arms; each test of each unit is a family of Holm's."""
    found: list[Paired] = []
    for unit in UNITS:
        for i, j in combinations(range(len(gathered.arms)), 2):
            arm, other = gathered.arms[i], gathered.arms[j]
            own = {PREFERENCE: preference_differences(compared, i, j, unit)}
            for outcome in gathered.outcomes:
                own[outcome.key] = rating_differences(gathered.ratings, outcome.key, arm, other, unit)
            found += [paired_tests(each, name, arm, other, unit) for name, each in own.items() if len(each)]
    rows = [test._asdict() for test in found]
    for unit in UNITS:
        family = [row for row in rows if row["unit"] == unit]
        for test in ("wilcoxon", "sign"):
            for row, p in zip(family, holm([row[test] for row in family]), strict=True):
                row[f"{test}_holm"] = p
    return rows
