"""Draw small training sets in which every label, even the rarest, has enough films (ChexReason, arXiv 2512.23090).

    >>> labels = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]], bool)
    >>> drawn = balanced_sample(labels, list("abcdef"), ["common", "rare"], sizes={"sft": 2, "rl": 2}, seed=0)
    >>> {name: films.counts.tolist() for name, films in drawn.sets.items()}
    {'sft': [1, 1], 'rl': [1, 1]}

`balanced_sample` draws sets that share no film and no patient, all at once, so that they divide the rare labels
fairly; what it minimises, and how, is written in `sampler_search.py`. `random_sample` draws from what is left.

A film without any label is never in a balanced set: it has no answer to learn. To have such films, give them a label.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlmalign.data.sampling.pool import Pool, encode
from vlmalign.data.sampling.search import Goal, greedy, improve, label_counts


@dataclass(frozen=True)
class Shortfall:
    """A label that cannot have, or did not get, what its floor asks for."""

    label: str
    where: str  #: the sets concerned
    needed: int
    available: int
    unit: str  #: "films" or "patients"

    def __str__(self) -> str:
        return f"{self.label} needs {self.needed} {self.unit} ({self.where}), {self.available} available"


class ShortfallError(ValueError):
    """Some labels cannot reach their floor; `shortfalls` names each with what it needs and what there is."""

    def __init__(self, shortfalls: Sequence[Shortfall], floor: float, remedy: str):
        self.shortfalls = tuple(shortfalls)
        named = "; ".join(str(shortfall) for shortfall in shortfalls)
        super().__init__(f"too few films for a floor of {floor:.3g} of every set: {named}. {remedy}")


@dataclass(frozen=True)
class SampleSet:
    """The films of one set, and how balanced they are."""

    indices: np.ndarray  #: [size] int64, rows of `labels`, ascending
    counts: np.ndarray  #: [labels] int64, films of the set with each label
    patients: int  #: distinct patients; smaller than the size where patients repeat
    goal: Goal  #: floor and targets, films
    objective: int  #: J of the set, films squared
    greedy_objective: int  #: J of the greedy picks, before any exchange

    @property
    def floor_met(self) -> np.ndarray:
        """[labels] bool; all True in what `balanced_sample` returns, which raises otherwise."""
        return self.counts >= self.goal.floor


@dataclass(frozen=True)
class SampleResult:
    """Balanced sets that share no film and no patient."""

    label_names: tuple[str, ...]
    pool_counts: np.ndarray  #: [labels] int64, films with each label that could be drawn
    sets: Mapping[str, SampleSet]
    patients: frozenset  #: ids of the patients of all sets, to exclude from the next draw


def balanced_sample(
    labels: np.ndarray,
    patients: Sequence | np.ndarray,
    label_names: Sequence[str],
    *,
    sizes: Mapping[str, int],
    seed: int,
    floor: float = 0.05,
    target: float | None = None,
    over_weight: int = 4,
    films_per_patient: int | None = None,
    exclude_patients: Collection = frozenset(),
) -> SampleResult:
    """Sets of films with balanced labels, disjoint by film and by patient (equation: `sampler_search.py`).

    Args:
        labels: [films, labels] bool, True where positive (in the paper uncertain and blank count as absent).
        patients: [films] ids, all of one sortable type.
        label_names: the columns of `labels`.
        sizes: films per set, such as {"sft": 2000, "rl": 1000}.
        seed: settles ties between label patterns and between patients, whatever the order of the rows.
        floor: share of each set that every label must reach, 0..1.
        target: share of each set that every label should have, 0..1. None: mean labels per film / number of labels;
            equal counts then hold as many labels as the source's films do, so balance is not bought with unusually
            rich or poor films. Rare labels are used up on the way to it; `target=floor` spares them.
        over_weight: what a film above the target costs, relative to one below it; a whole number >= 1.
        films_per_patient: most films of one patient in a set; None for no limit. Among films with the same labels new
            patients come first, so patients repeat for rare combinations only. One film per patient is the cleaner
            set but often out of reach: NIH's 227 Hernia films come from 134 patients, and sets of 2,000 and 1,000
            need 150.
        exclude_patients: ids that must not be drawn; ids that `patients` lacks are ignored.

    Raises:
        ShortfallError: a label has too few films or patients to reach its floor in all sets together, or the search
            ended below a floor (labels that are each frequent enough, but not together).
        ValueError: arguments that do not fit together, or too few films for the sizes.
    """
    labels, patients = np.asarray(labels), np.asarray(patients)
    _check(labels, patients, label_names, sizes, floor, target, over_weight, films_per_patient)
    per_patient = films_per_patient or max(sizes.values())
    patient, left = _films_left(patients, exclude_patients)
    rows = np.flatnonzero(left & labels.any(1))
    labels, patient = labels[rows], patient[rows]

    wanted, found = sum(sizes.values()), int(np.minimum(np.bincount(patient), per_patient).sum())
    if found < wanted:
        raise ValueError(
            f"expected {wanted} labelled films or more outside exclude_patients for sizes={dict(sizes)}, found "
            f"{len(rows)} ({found} at no more than {per_patient} per patient); reduce sizes"
        )
    # the small allowance makes 5 % of 2,000 films 100, not 101
    floors = {name: int(np.ceil(floor * size - 1e-9)) for name, size in sizes.items()}
    available = _available(labels, patient, label_names, floors, floor, per_patient)
    if target is None:
        target = float(labels.sum(1).mean()) / len(label_names)
    goals = []
    for name, size in sizes.items():
        targets = np.maximum(floors[name], np.minimum(round(target * size), available * size // wanted))
        missing = 1 + over_weight * len(label_names) * len(sizes) * size**2
        goals.append(Goal(size, floors[name], targets, over_weight, missing))

    rng = np.random.default_rng(seed)
    scarce = 2 * sum(floors.values()) >= available
    pool = Pool(labels, patient, scarce, sets=len(sizes), per_patient=per_patient, rng=rng)
    greedy(pool, goals)
    before = [goal.objective(label_counts(pool, i)) for i, goal in enumerate(goals)]
    improve(pool, goals, rng)

    sets = {}
    for i, (name, goal) in enumerate(zip(sizes, goals, strict=True)):
        films = np.flatnonzero(pool.home == i)
        counts = labels[films].sum(0)
        holders = len(np.unique(patient[films]))
        sets[name] = SampleSet(rows[films], counts, holders, goal, goal.objective(counts), before[i])
    _refuse_missed(sets, label_names, floor)
    drawn = patients[rows[pool.home >= 0]]
    return SampleResult(tuple(label_names), labels.sum(0), sets, frozenset(drawn.tolist()))


def random_sample(
    patients: Sequence | np.ndarray, n: int, *, seed: int, exclude_patients: Collection = frozenset()
) -> np.ndarray:
    """n films drawn at random, without regard to labels, from patients not excluded: [n] int64, ascending.

    For validation, draw it last and exclude `SampleResult.patients`: it then has the source's prevalence, but less of
    the rare labels that the balanced sets have used up.

    >>> random_sample(["p1", "p1", "p2", "p3"], 2, seed=0, exclude_patients=["p1"])
    array([2, 3])

    Raises:
        ValueError: fewer than n films are left.
    """
    _, left = _films_left(np.asarray(patients), exclude_patients)
    rows = np.flatnonzero(left)
    if not 0 <= n <= len(rows):
        raise ValueError(f"expected 0 <= n <= {len(rows)}, the films outside exclude_patients, found n={n}")
    return np.sort(np.random.default_rng(seed).choice(rows, n, replace=False))


def coverage(labels: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Share of the films at `indices` that have each label: [labels] float64, 0..1; NaN for no films.

    >>> coverage(np.array([[True, False], [True, True], [False, False]]), np.array([0, 1]))
    array([1. , 0.5])
    """
    return np.asarray(labels)[indices].sum(0) / np.float64(len(indices))


def _films_left(patients: np.ndarray, excluded: Collection) -> tuple[np.ndarray, np.ndarray]:
    """Each film's patient as a rank, [films] int64, and whether the patient may be drawn, [films] bool."""
    code, rank = encode(patients)
    allowed = np.ones(len(rank), bool)
    allowed[[rank[patient] for patient in excluded if patient in rank]] = False
    return code, allowed[code]


def _check(
    labels: np.ndarray,
    patients: np.ndarray,
    label_names: Sequence[str],
    sizes: Mapping[str, int],
    floor: float,
    target: float | None,
    over_weight: int,
    films_per_patient: int | None,
) -> None:
    if labels.ndim != 2 or labels.dtype != bool:
        raise ValueError(f"labels must be bool [films, labels], found {labels.dtype} {list(labels.shape)}")
    if patients.shape != labels.shape[:1]:
        raise ValueError(f"patients must hold one id per film, {len(labels)}, found shape {list(patients.shape)}")
    if len(label_names) != labels.shape[1] or len(set(label_names)) != len(label_names):
        raise ValueError(f"label_names must be {labels.shape[1]} distinct names, found {list(label_names)}")
    if not sizes or min(sizes.values()) < 1:
        raise ValueError(f"sizes must name one set or more, each of 1 film or more, found {dict(sizes)}")
    for name, share in (("floor", floor), ("target", target)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name} must be a share of the set, 0..1, found {share}")
    if over_weight != int(over_weight) or over_weight < 1:
        raise ValueError(f"over_weight must be a whole number >= 1, found {over_weight}")
    if films_per_patient is not None and films_per_patient < 1:
        raise ValueError(f"films_per_patient must be >= 1, or None for no limit, found {films_per_patient}")


def _available(
    labels: np.ndarray,
    patient: np.ndarray,
    label_names: Sequence[str],
    floors: Mapping[str, int],
    floor: float,
    per_patient: int,
) -> np.ndarray:
    """Films that the sets together can have of each label, [labels] int64; raises where a floor needs more."""
    needed = sum(floors.values())
    where = " + ".join(f"{name} {least}" for name, least in floors.items())
    available = np.zeros(len(label_names), np.int64)
    shortfalls = []
    for i, label in enumerate(label_names):
        films = np.bincount(patient[labels[:, i]])
        holders = int(np.count_nonzero(films))
        available[i] = np.minimum(films, per_patient).sum()
        if available[i] < needed:
            shortfalls.append(Shortfall(label, where, needed, int(available[i]), "films"))
        elif needed and holders < len(floors):
            shortfalls.append(Shortfall(label, "one per set", len(floors), holders, "patients"))
    if shortfalls:
        limit = f"A set takes at most {per_patient} films of a patient, and no patient is in two sets"
        raise ShortfallError(shortfalls, floor, f"{limit}: lower floor or sizes, or leave the label out")
    return available


def _refuse_missed(sets: Mapping[str, SampleSet], label_names: Sequence[str], floor: float) -> None:
    missed = [
        Shortfall(label_names[i], f"set {name}", drawn.goal.floor, int(drawn.counts[i]), "films")
        for name, drawn in sets.items()
        for i in np.flatnonzero(~drawn.floor_met)
    ]
    if missed:
        raise ShortfallError(missed, floor, "The search found no better sets: lower floor or sizes")
