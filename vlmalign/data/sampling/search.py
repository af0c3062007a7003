"""The objective of the balanced sampler and the search for it: greedy picks by turns, then exchanges.

ChexReason (arXiv 2512.23090) describes a penalty-based greedy iterative sampler: films that reduce the deficit of
under-represented labels win, films that add to over-represented ones are heavily penalised, every label ends in at
least 5 % of the films. It prints no formula. Ours: for a set of n films (S sets, N films in all of them) in which label
l of L stands c_l times, minimise

    J(c) = sum_l  W (max(0, F_l - c_l) + max(0, c_l - C_l))  +  max(0, T_l - c_l)^2  +  rho max(0, c_l - T_l)^2

    n    films of the set                  `Goal.size`
    F_l  films label l must reach          `Goal.floor`        ceil(floor n), or a number of films
    C_l  films label l must not exceed     `Goal.cap`          floor(cap n), or a number of films; n without a cap
    T_l  films label l should have         `Goal.target`       max(F_l, min(round(target n), floor(A_l n / N), C_l)),
                                                               where A_l is how many films there are: a fair share of
                                                               the rare, not all of them to the set that asks first
    rho  weight of over-representation     `Goal.over_weight`
    W    one film out of bounds            `Goal.missing`      1 + rho L S n^2 outweighs all balance of all sets

J is in films squared; for several sets the sum of J / n^2 is minimised, in which sets of all sizes weigh the same.

1. Greedy: pick k = 1..n takes the film whose labels have the least sum of

       m_k(c_l) = B_k(c_l + 1) - B_k(c_l),    B_k(c) = max(0, T_l k/n - c)^2 + rho max(0, c - T_l k/n)^2,

   the balance terms of J for a set that has grown to k films. (Descending J itself from the empty set, where every
   label is in deficit, takes the films with most labels first: 2,000 films of NIH ended near J = 350,000, where
   this ends near 50.) The sets pick by turns in proportion to their sizes.
2. Exchange: a film of the set is replaced by the best film left as long as J falls.
3. A few films of any set are replaced at random and 2 is repeated; the result is kept unless the sum rises. It is done
   4000 // N times, and up to ten times as often while a floor or a cap is missed. The paper mentions neither 2 nor 3;
   in sets of a dozen films greedy alone stays well above the optimum and may miss a floor.

Greedy may also give so many patients to one set that another finds none, and 3 may end below a floor. Small pools are
then drawn from by integer programming (`exact.py`), and 2 and 3 go on from there.

The cost of a film depends on its label pattern only, so patterns are scored, not films. Costs are whole numbers (in 1
multiplied by n^2); below 2^53, in sets of up to 6,000 films, float64 adds them exactly in any order, so ties are true
ties on every machine and go to the pattern that comes first in the pool's seeded order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from vlmalign.data.sampling.pool import Pool

_KICK = 4  # films replaced at random before the exchange is repeated
_KICKED = 4000  # films of all sets times repeats: small sets need the repeats, large ones hardly gain by them
_PATIENCE = 10  # times as many repeats while a floor or a cap is missed


@dataclass(frozen=True)
class Goal:
    """The objective J of one set."""

    size: int  #: n, films
    floor: np.ndarray  #: F, [labels] int64, films
    cap: np.ndarray  #: C, [labels] int64, films, not below the floor
    target: np.ndarray  #: T, [labels] int64, films
    over_weight: int  #: rho, >= 1
    missing: int  #: W, films squared per film

    def objective(self, counts: np.ndarray) -> int:
        """J of the label counts [labels], films squared."""
        return int(self._terms(counts).sum())

    def marginal(self) -> np.ndarray:
        """What one more film adds to J where a label stands c = 0..size times: [size + 1, labels] float64."""
        return np.diff(self._terms(np.arange(self.size + 2)[:, None]), axis=0).astype(np.float64)

    def pace(self, counts: np.ndarray, k: int) -> np.ndarray:
        """n^2 m_k(counts): [labels] float64."""
        target = self.target * float(k)  # float: n^4 would overflow int64 in sets of 40,000 films
        return self._balance(self.size * (counts + 1.0), target) - self._balance(self.size * counts, target)

    def keeps(self, counts: np.ndarray) -> np.ndarray:
        """Which labels stand within their floor and cap, [labels] bool."""
        return (self.floor <= counts) & (counts <= self.cap)

    def _terms(self, counts: np.ndarray) -> np.ndarray:
        outside = np.maximum(0, self.floor - counts) + np.maximum(0, counts - self.cap)
        return self.missing * outside + self._balance(counts, self.target)

    def _balance(self, counts: np.ndarray, target: np.ndarray) -> np.ndarray:
        return np.maximum(0, target - counts) ** 2 + self.over_weight * np.maximum(0, counts - target) ** 2


def label_counts(pool: Pool, set: int) -> np.ndarray:
    """Films of the set with each label: [labels] int64."""
    return (pool.picked[set] @ pool.patterns).astype(np.int64)


def greedy(pool: Pool, goals: Sequence[Goal]) -> bool:
    """Fills every set from empty (step 1); False as soon as a set finds no film of a patient of no other set."""
    sizes = [goal.size for goal in goals]
    # pick k of n is due at (k - 1/2) / n of the way
    due = np.concatenate([(np.arange(size) + 0.5) / size for size in sizes])
    turns = np.repeat(np.arange(len(goals)), sizes)[np.argsort(due, kind="stable")]
    counts = [np.zeros(len(goal.target), np.int64) for goal in goals]
    picks = [0] * len(goals)
    for set in turns.tolist():
        picks[set] += 1
        found = pool.best(pool.patterns @ goals[set].pace(counts[set], picks[set]), set)
        if found is None:
            return False
        film, _ = found
        pool.take(film, set)
        counts[set] += pool.patterns[pool.pattern[film]].astype(np.int64)
    return True


def improve(
    pool: Pool, goals: Sequence[Goal], rng: np.random.Generator, hopeless: Callable[[], bool] = lambda: False
) -> None:
    """Lowers the sum of J / n^2 (steps 2 and 3) without changing the sizes of the sets.

    `hopeless` is asked once, where floors and caps are not met in the usual time, whether it is of no use to go on.
    """
    lowest = _exchange_all(pool, goals)
    balance = len(goals) * goals[0].over_weight * len(goals[0].target)  # the most that a sum without W can be
    repeats = _KICKED // sum(goal.size for goal in goals)
    for repeat in range(_PATIENCE * repeats):
        if lowest == 0 or (repeat >= repeats and lowest <= balance) or (repeat == repeats and hopeless()):
            return
        saved = pool.save()
        for _ in range(_KICK):
            weights = pool.picked.ravel() / pool.picked.sum()
            set, out = divmod(int(rng.choice(weights.size, p=weights)), len(pool.patterns))
            pool.release(out, set)
            film, _ = pool.best(rng.random(len(pool.patterns)), set)  # never None: the released film is left
            pool.take(film, set)
        value = _exchange_all(pool, goals)
        if value > lowest:
            pool.restore(saved)
        lowest = min(lowest, value)


def _exchange_all(pool: Pool, goals: Sequence[Goal]) -> Fraction:
    """Lowers each J by single exchanges; the sum of J / n^2 that remains, exactly."""
    for set, goal in enumerate(goals):
        _exchange(pool, set, goal)
    return sum(Fraction(goal.objective(label_counts(pool, set)), goal.size**2) for set, goal in enumerate(goals))


def _exchange(pool: Pool, set: int, goal: Goal) -> None:
    marginal, patterns = goal.marginal(), pool.patterns.astype(np.int64)
    counts, column = label_counts(pool, set), np.arange(len(goal.target))
    improved = True
    while improved:  # ends: J is a whole number >= 0 and falls with every exchange
        improved = False
        for out in np.flatnonzero(pool.picked[set]).tolist():
            while pool.picked[set, out]:
                cost = marginal[counts - patterns[out], column]  # of one more film, once `out` has gone
                found = pool.best(pool.patterns @ cost, set)
                if found is None or found[1] >= pool.patterns[out] @ cost:
                    break
                film, _ = found
                pool.release(out, set)
                pool.take(film, set)
                counts += patterns[pool.pattern[film]] - patterns[out]
                improved = True
