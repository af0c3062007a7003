"""Sets by integer programming, for small pools in which the search (`search.py`) finds none.

Films of one label pattern are interchangeable, and so are patients whose films have the same patterns: such patients are
one *kind*. The unknowns are therefore counts, for every set s:

    k_qs   patients of kind q in the set       sum_s k_qs <= patients of the kind
    n_qps  their films of pattern p            n_qps <= m_qp k_qs,    sum_p n_qps <= P k_qs,    sum_qp n_qps = films of s

A patient of kind q has m_qp films of pattern p and gives a set P films at most. All such counts can be drawn: dealt out
pattern by pattern, each film to the patient with fewest, the loads of the k_qs patients never differ by more than one.

    draw      min sum_ls u_ls + o_ls    F_ls <= c_ls + u_ls - o_ls <= C_ls     0: the sets exist; above 0: they do not
    largest   max t <= 1                c_ls >= t f_ls,    c_ls <= C_ls        how much of all floors can be had at once

c_ls counts the films of set s with label l; F and C are its floor and its cap, f the floor before it is rounded up.
`scipy.optimize.milp` (HiGHS) solves both; what it has not settled when its time is up is reported as not settled.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from vlmalign.data.sampling.pool import label_patterns

MOST_UNKNOWNS = 10_000  #: beyond this HiGHS seldom ends in time
SECONDS = 20.0  #: for one programme; HiGHS looks at the clock now and then, so it may take somewhat longer

_SOLVED, _INFEASIBLE = 0, 2  # `milp`'s status


class Drawn(NamedTuple):
    """What `Programme.draw` found."""

    films: tuple[np.ndarray, ...] | None  #: rows of each set; None: no sets were found
    short: np.ndarray | None  #: [labels, sets] films missing to the floors, as few as can be; None: of no use
    over: np.ndarray | None  #: [labels, sets] films above the caps
    proved: bool  #: without films: whether there are no such sets


class Largest(NamedTuple):
    """What `Programme.largest` found."""

    share: float | None  #: of the floors, 0..1; None: nothing was found
    proved: bool  #: whether no more can be had


class _Rows(NamedTuple):
    """What the unknowns, k and then n, must keep: low <= possible x <= high and 0 <= x <= most; their labels."""

    possible: sparse.csr_array
    low: np.ndarray
    high: np.ndarray
    most: np.ndarray
    counts: sparse.csr_array  #: x -> c, by label and set


class Programme:
    """The sets of these sizes that share no film and no patient; nothing is computed before it is asked for.

    Args:
        labels: [films, labels] bool.
        patients: [films] int64, ranks 0..patients-1.
        sizes: films of each set.
        per_patient: most films of one patient in a set.
    """

    def __init__(self, labels: np.ndarray, patients: np.ndarray, *, sizes: Sequence[int], per_patient: int):
        self._labels, self._patients, self._sizes, self._per_patient = labels, patients, sizes, per_patient

    @cached_property
    def _patterns(self) -> tuple[np.ndarray, np.ndarray]:
        return label_patterns(self._labels)

    @cached_property
    def _kinds(self) -> dict[tuple[tuple[int, int], ...], list[int]]:
        return _kinds(self._patients, self._patterns[1])

    @property
    def unknowns(self) -> int:
        return len(self._sizes) * (len(self._kinds) + sum(map(len, self._kinds)))

    @cached_property
    def _rows(self) -> _Rows:
        pairs = np.array([pair for kind in self._kinds for pair in kind])  # [pairs, 2]: pattern, films of one patient
        kind = np.repeat(np.arange(len(self._kinds)), [len(kind) for kind in self._kinds])
        patients = np.array([len(members) for members in self._kinds.values()])
        pattern, films = pairs.T
        sets = len(self._sizes)
        each_set, each_kind = sparse.eye_array(sets), sparse.eye_array(len(patients))
        of_kind = sparse.csr_array((np.ones(len(pairs)), (np.arange(len(pairs)), kind)))
        possible = sparse.block_array(
            [  # k by kind and set; n by pair and set
                [sparse.kron(each_kind, np.ones((1, sets))), None],
                [-sparse.kron(sparse.diags_array(films.astype(float)) @ of_kind, each_set), sparse.eye_array(len(pairs) * sets)],
                [-sparse.kron(self._per_patient * each_kind, each_set), sparse.kron(of_kind.T, each_set)],
                [None, sparse.kron(np.ones((1, len(pairs))), each_set)],
            ]
        )  # fmt: skip
        inner = (len(pairs) + len(patients)) * sets
        labelled = sparse.kron(self._patterns[0][pattern].T.astype(float), each_set)
        return _Rows(
            possible.tocsr(),
            np.concatenate([np.full(len(patients) + inner, -np.inf), self._sizes]),
            np.concatenate([patients, np.zeros(inner), self._sizes]),
            np.concatenate([np.repeat(patients, sets), np.repeat(films * patients[kind], sets)]),
            sparse.hstack([sparse.csr_array((labelled.shape[0], len(patients) * sets)), labelled]).tocsr(),
        )

    def draw(self, floor: np.ndarray, cap: np.ndarray, rng: np.random.Generator) -> Drawn:
        """Films of sets that keep floor and cap, [labels, sets] films; `rng` chooses among patients of a kind."""
        eye = sparse.eye_array(floor.size)
        bounded = (sparse.hstack([eye, -eye]), floor.ravel(), cap.ravel())
        solved = self._solve(np.ones(2 * floor.size), [bounded], most=np.inf)
        if solved.x is None:
            return Drawn(None, None, None, solved.status == _INFEASIBLE)
        counts, slack = np.split(np.rint(solved.x).astype(np.int64), [self.unknowns])
        if slack.any():
            short, over = slack.reshape(2, *floor.shape)
            return Drawn(None, short, over, solved.status == _SOLVED)
        return Drawn(self._dealt(counts, rng), None, None, False)

    def largest(self, asked: np.ndarray, cap: np.ndarray) -> Largest:
        """How much of the floors `asked` can be had at once; asked and cap [labels, sets], films, may be fractions."""
        above = (sparse.csr_array(-asked.reshape(-1, 1)), 0.0, np.inf)
        below = (sparse.csr_array((asked.size, 1)), -np.inf, cap.ravel())
        solved = self._solve(-np.ones(1), [above, below], most=1.0)
        if solved.x is None:
            return Largest(None, solved.status == _INFEASIBLE)
        counts = (self._rows.counts @ np.rint(solved.x[: self.unknowns])).reshape(asked.shape)
        share = np.divide(counts, asked, out=np.ones(asked.shape), where=asked > 0).min()
        return Largest(float(min(share, 1.0)), solved.status == _SOLVED)

    def _solve(self, cost: np.ndarray, bounded: Sequence[tuple], *, most: float) -> OptimizeResult:
        """Least cost of further unknowns 0..most, which the rows (columns, low, high) join to the label counts."""
        more = len(cost)
        possible, lowest, highest, limits, counts = self._rows
        possible = sparse.hstack([possible, sparse.csr_array((possible.shape[0], more))])
        constraints = [LinearConstraint(possible, lowest, highest)]
        constraints += [LinearConstraint(sparse.hstack([counts, columns]), low, high) for columns, low, high in bounded]
        return milp(
            np.concatenate([np.zeros(self.unknowns), cost]),
            constraints=constraints,
            integrality=np.concatenate([np.ones(self.unknowns), np.zeros(more)]),
            bounds=Bounds(0, np.concatenate([limits, np.full(more, most)])),
            options={"time_limit": SECONDS, "mip_rel_gap": 0},
        )

    def _dealt(self, counts: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        """Rows of each set: the counts dealt out to patients of each kind, who come in random order."""
        takes, films = (
            part.reshape(-1, len(self._sizes)) for part in np.split(counts, [len(self._kinds) * len(self._sizes)])
        )
        left: dict[tuple[int, int], list[int]] = {}  # (patient, pattern) -> films
        for row, held in enumerate(zip(self._patients.tolist(), self._patterns[1].tolist(), strict=True)):
            left.setdefault(held, []).append(row)
        drawn: list[list[int]] = [[] for _ in range(len(self._sizes))]
        pair = 0
        for (kind, members), taken in zip(self._kinds.items(), takes, strict=True):
            members = rng.permutation(members).tolist()
            for set in range(len(self._sizes)):
                chosen, members = members[: taken[set]], members[taken[set] :]
                load = dict.fromkeys(chosen, 0)
                for place, (pattern, _) in enumerate(kind, start=pair):
                    for _ in range(films[place, set]):
                        patient = min((each for each in chosen if left[each, pattern]), key=load.__getitem__)
                        drawn[set].append(left[patient, pattern].pop(0))
                        load[patient] += 1
            pair += len(kind)
        return tuple(np.sort(np.array(rows, np.int64)) for rows in drawn)


def _kinds(patients: np.ndarray, pattern: np.ndarray) -> dict[tuple[tuple[int, int], ...], list[int]]:
    """Patients by what they have, ((pattern, films), ...) in order; the kinds are in order as well, whatever the rows'."""
    pairs, films = np.unique(np.stack([patients, pattern], 1), axis=0, return_counts=True)
    has: dict[int, list[tuple[int, int]]] = {}
    for (patient, which), number in zip(pairs.tolist(), films.tolist(), strict=True):
        has.setdefault(patient, []).append((which, number))
    kinds: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for patient, held in has.items():
        kinds.setdefault(tuple(held), []).append(patient)
    return dict(sorted(kinds.items()))
