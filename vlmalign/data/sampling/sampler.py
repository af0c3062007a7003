"""Draw small training sets in which every label, even the rarest, has enough films (ChexReason, arXiv 2512.23090).

    >>> labels = np.array([[1, 0], [1, 0], [1, 0], [1, 0], [0, 1], [0, 1]], bool)
    >>> drawn = balanced_sample(labels, list("abcdef"), ["common", "rare"], sizes={"sft": 2, "rl": 2}, seed=0)
    >>> {name: films.counts.tolist() for name, films in drawn.sets.items()}
    {'sft': [1, 1], 'rl': [1, 1]}

`balanced_sample` draws sets that share no film and no patient, all at once, so that they divide the rare labels
fairly; what it minimises, and how, is written in `search.py`. `random_sample` draws from what is left.

A film without any label is never in a balanced set: it has no answer to learn. To have such films, give them a label.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType

import numpy as np

from vlmalign.data.sampling.bounds import Bound, Bounds, bounds_of
from vlmalign.data.sampling.exact import MOST_UNKNOWNS, Drawn, Programme
from vlmalign.data.sampling.pool import Pool, encode
from vlmalign.data.sampling.refusals import Asked, Shortfall
from vlmalign.data.sampling.search import Goal, greedy, improve, label_counts

NO_BOUNDS: Mapping[str, Bound] = MappingProxyType({})


@dataclass(frozen=True)
class SampleSet:
    """The films of one set, and how balanced they are."""

    indices: np.ndarray  #: [size] int64, rows of `labels`, ascending
    counts: np.ndarray  #: [labels] int64, films of the set with each label
    patients: int  #: distinct patients; smaller than the size where patients repeat
    goal: Goal  #: floors, caps and targets, films
    objective: int  #: J of the set, films squared
    greedy_objective: int  #: J before any exchange: of the greedy picks, or of what integer programming drew

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
    exact: bool  #: whether the search failed and went on from sets that integer programming found


def balanced_sample(
    labels: np.ndarray,
    patients: Sequence | np.ndarray,
    label_names: Sequence[str],
    *,
    sizes: Mapping[str, int],
    seed: int,
    floor: Bound = 0.05,
    floors: Mapping[str, Bound] = NO_BOUNDS,
    cap: Bound | None = None,
    caps: Mapping[str, Bound] = NO_BOUNDS,
    target: float | None = None,
    over_weight: int = 4,
    films_per_patient: int | None = None,
    exclude_patients: Collection = frozenset(),
) -> SampleResult:
    """Sets of films with balanced labels, disjoint by film and by patient (equation: `search.py`).

    Args:
        labels: [films, labels] bool, True where positive (in the paper uncertain and blank count as absent).
        patients: [films] ids, all of one sortable type.
        label_names: the columns of `labels`.
        sizes: films per set, such as {"sft": 2000, "rl": 1000}.
        seed: settles ties between label patterns and between patients, whatever the order of the rows.
        floor: what every label must reach in each set: a share of the set (a float, 0..1) or films (an int).
        floors: floors of single labels, instead of `floor`.
        cap: what no label may exceed in a set, likewise; None for no cap.
        caps: caps of single labels, instead of `cap`.
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
        ShortfallError: a label has too few films or patients to reach its floor in all sets together, or no sets were
            found that keep all floors and caps (labels that are each frequent enough, but not together). In small pools
            integer programming has then proved that there are none, or the message says that it has not.
        ValueError: arguments that do not fit together, or too few films or patients for the sizes.
    """
    labels, patients = np.asarray(labels), np.asarray(patients)
    _check(labels, patients, label_names, sizes, target, over_weight, films_per_patient)
    bounds = bounds_of(label_names, sizes, floor=floor, floors=floors, cap=cap, caps=caps)
    per_patient = films_per_patient or max(sizes.values())
    patient, left = _films_left(patients, exclude_patients)
    rows = np.flatnonzero(left & labels.any(1))
    labels, patient = labels[rows], patient[rows]

    wanted, usable = sum(sizes.values()), int(np.minimum(np.bincount(patient), per_patient).sum())
    if usable < wanted:
        raise ValueError(
            f"expected {wanted} labelled films or more outside exclude_patients for sizes={dict(sizes)}, found "
            f"{len(rows)} ({usable} at no more than {per_patient} per patient); reduce sizes"
        )
    programme = Programme(labels, patient, sizes=[*sizes.values()], per_patient=per_patient)
    asked = Asked(label_names, sizes, bounds, None if floors else floor, films_per_patient)
    available = np.stack([np.minimum(np.bincount(patient[on]), per_patient).sum() for on in labels.T])
    if missing := [*_shortfalls(labels, patient, available, asked)]:
        raise asked.too_few(missing, programme)
    if target is None:
        target = float(labels.sum(1).mean()) / len(label_names)
    goals = _goals([*sizes.values()], bounds, available, target, over_weight)
    rng = np.random.default_rng(seed)
    scarce = 2 * bounds.floor.sum(1) >= available
    pool = Pool(labels, patient, scarce, sets=len(sizes), per_patient=per_patient, rng=rng)

    @cache
    def solved() -> Drawn | None:
        small = programme.unknowns <= MOST_UNKNOWNS
        return programme.draw(bounds.floor, bounds.cap, np.random.default_rng(seed)) if small else None

    def hopeless() -> bool:
        return (found := solved()) is not None and found.films is None and found.proved

    start = pool.save()
    if full := greedy(pool, goals):
        before = _objectives(pool, goals)
        improve(pool, goals, rng, hopeless)
    searched = np.stack([label_counts(pool, i) for i in range(len(goals))])
    if exact := not (full and all(goal.keeps(counts).all() for goal, counts in zip(goals, searched, strict=True))):
        if (found := solved()) is None or found.films is None:
            raise asked.none_found(searched.T if full else None, programme, found)
        pool.restore(start)
        for i, films in enumerate(found.films):
            for film in films.tolist():
                pool.take(film, i)
        before = _objectives(pool, goals)
        improve(pool, goals, rng)

    sets = {}
    for i, (name, goal) in enumerate(zip(sizes, goals, strict=True)):
        films = np.flatnonzero(pool.home == i)
        counts = labels[films].sum(0)
        assert goal.keeps(counts).all()
        holders = len(np.unique(patient[films]))
        sets[name] = SampleSet(rows[films], counts, holders, goal, goal.objective(counts), before[i])
    drawn = patients[rows[pool.home >= 0]]
    return SampleResult(tuple(label_names), labels.sum(0), sets, frozenset(drawn.tolist()), exact)


def _goals(sizes: Sequence[int], bounds: Bounds, available: np.ndarray, target: float, over_weight: int) -> list[Goal]:
    """What each set is drawn for: its bounds, and the target between them that its share of the films allows."""
    goals = []
    for i, size in enumerate(sizes):
        least, most = bounds.floor[:, i], bounds.cap[:, i]
        reachable = np.minimum(round(target * size), available * size // sum(sizes))
        weight = 1 + over_weight * len(available) * len(sizes) * size**2
        goals.append(Goal(size, least, most, np.clip(reachable, least, most), over_weight, weight))
    return goals


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
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"target must be a share of the set, 0..1, found {target}")
    if over_weight != int(over_weight) or over_weight < 1:
        raise ValueError(f"over_weight must be a whole number >= 1, found {over_weight}")
    if films_per_patient is not None and films_per_patient < 1:
        raise ValueError(f"films_per_patient must be >= 1, or None for no limit, found {films_per_patient}")


def _shortfalls(labels: np.ndarray, patient: np.ndarray, available: np.ndarray, asked: Asked) -> Iterator[Shortfall]:
    """Labels of which the sets together need more films, of the `available` [labels] int64, or patients, than there are."""
    floors = asked.bounds.floor
    for i, label in enumerate(asked.label_names):
        needed, sets = int(floors[i].sum()), int(np.count_nonzero(floors[i]))
        holders = int(np.count_nonzero(np.bincount(patient[labels[:, i]])))
        if available[i] < needed:
            where = " + ".join(f"{name} {least}" for name, least in zip(asked.sizes, floors[i].tolist(), strict=True))
            yield Shortfall(label, where, needed, int(available[i]), "films")
        elif holders < sets:
            yield Shortfall(label, "one per set", sets, holders, "patients")


def _objectives(pool: Pool, goals: Sequence[Goal]) -> list[int]:
    return [goal.objective(label_counts(pool, i)) for i, goal in enumerate(goals)]
