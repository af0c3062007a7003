"""Which film may still go to which set: films grouped by label pattern, patients owned by one set at a time.

Films with the same labels are interchangeable for the sampler's objective, so it chooses a pattern and asks the pool
for a film of it. Everything here is counted in films; `set` is the index of a set that is being drawn.
"""

from __future__ import annotations

import numpy as np

FREE = -1  #: a film in no set, a patient owned by no set


def encode(patients: np.ndarray) -> tuple[np.ndarray, dict]:
    """The rank of each film's patient among the sorted distinct ids, [films] int64, and the rank of each id."""
    if patients.dtype.kind in "iu":  # sorting numbers is faster than hashing them one by one; of texts it is slower
        distinct, code = np.unique(patients, return_inverse=True)
        return code, {patient: i for i, patient in enumerate(distinct.tolist())}
    values = patients.tolist()
    rank = {patient: i for i, patient in enumerate(sorted(set(values)))}
    return np.fromiter((rank[patient] for patient in values), np.int64, len(values)), rank


def label_patterns(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of labels [films, labels] in sorted order, and the row each film has, [films] int64."""
    code = np.zeros(len(labels), np.int64)
    # 32 columns at a time: sorting one integer per film is ten times as fast as sorting rows
    for low in range(0, labels.shape[1], 32):
        part = labels[:, low : low + 32]
        word = part @ (1 << np.arange(part.shape[1], dtype=np.int64))
        _, word = np.unique(word, return_inverse=True)
        _, first, code = np.unique(code * (word.max() + 1) + word, return_index=True, return_inverse=True)
    return labels[first], code


class Pool:
    """The films that sets are drawn from. A patient whose film was taken belongs to that set until it is released.

    Args:
        labels: [films, labels] bool, at least one True per row.
        patients: [films] int64, ranks 0..patients-1.
        scarce: [labels] bool, labels of which half the films or more are needed. A patient who has one on *another*
            film is drawn last: a patient belongs to one set only and would be lost to the others.
        sets: number of sets.
        per_patient: most films of one patient in a set.
        rng: breaks ties between patterns, then between patients.
    """

    def __init__(
        self,
        labels: np.ndarray,
        patients: np.ndarray,
        scarce: np.ndarray,
        *,
        sets: int,
        per_patient: int,
        rng: np.random.Generator,
    ):
        distinct, code = label_patterns(labels)
        shuffle = rng.permutation(len(distinct))
        self.patterns = distinct[shuffle].astype(np.float64)  # [patterns, labels]; float64 for the dot products
        self.pattern = np.argsort(shuffle)[code]  # [films]
        self.patient = patients
        self.per_patient = per_patient
        number = int(patients.max()) + 1

        # by pattern, then scarcity, then patient in seeded order: the order of the rows decides between equal films
        # of one patient only
        holds = np.zeros((number, int(scarce.sum())), bool)
        films, which = np.nonzero(labels[:, scarce])
        holds[patients[films], which] = True
        late = (holds[patients] & ~labels[:, scarce]).any(1)
        key = (self.pattern * 2 + late) * number + rng.permutation(number)[patients]
        self._order = np.argsort(key, kind="stable")
        self._start = np.searchsorted(self.pattern[self._order], np.arange(len(distinct) + 1))
        self._by_patient = np.argsort(patients, kind="stable")
        self._first = np.searchsorted(patients[self._by_patient], np.arange(number + 1))

        self.home = np.full(len(labels), FREE)  # [films]: the set a film was taken for
        self._owner = np.full(number, FREE)  # [patients]: the set a patient belongs to
        self._load = np.zeros(number, np.int64)  # [patients]: films taken
        self._spent = np.zeros((sets, len(distinct)), bool)  # no film of this pattern is left for this set
        self.picked = np.zeros((sets, len(distinct)), np.int64)  # films taken, by set and pattern

    def best(self, cost: np.ndarray, set: int) -> tuple[int, float] | None:
        """A film of the cheapest pattern that `set` can still have, with its cost; None when nothing is left.

        `cost` [patterns] float64 is overwritten. The first of equal costs wins (patterns are in seeded order).
        """
        cost[self._spent[set]] = np.inf
        while (lowest := cost[pattern := int(cost.argmin())]) < np.inf:
            film = self._find(pattern, set)
            if film is not None:
                return film, float(lowest)
            self._spent[set, pattern] = True
            cost[pattern] = np.inf
        return None

    def _find(self, pattern: int, set: int) -> int | None:
        films = self._order[self._start[pattern] : self._start[pattern + 1]]
        for low in range(0, len(films), 1024):  # the first block mostly has one; a pattern may have 100,000 films
            new = self._owner[self.patient[films[low : low + 1024]]] == FREE
            if new.any():
                return int(films[low + new.argmax()])
        films = films[self.home[films] == FREE]
        patients = self.patient[films]
        known = (self._owner[patients] == set) & (self._load[patients] < self.per_patient)
        return int(films[known.argmax()]) if known.any() else None

    def take(self, film: int, set: int) -> None:
        """Puts a free film, and with it its patient, into `set`."""
        patient = self.patient[film]
        assert self.home[film] == FREE
        assert self._owner[patient] in (FREE, set)
        self.home[film] = self._owner[patient] = set
        self._load[patient] += 1
        self.picked[set, self.pattern[film]] += 1

    def release(self, pattern: int, set: int) -> None:
        """Takes one film of this pattern out of `set`: one of the patient with most films in the set."""
        films = self._order[self._start[pattern] : self._start[pattern + 1]]
        films = films[self.home[films] == set]
        film = films[self._load[self.patient[films]].argmax()]
        patient = self.patient[film]
        self.home[film] = FREE
        self._load[patient] -= 1
        if not self._load[patient]:
            self._owner[patient] = FREE
        self.picked[set, pattern] -= 1
        held = self._by_patient[self._first[patient] : self._first[patient + 1]]
        self._spent[:, self.pattern[held]] = False

    def save(self) -> tuple[np.ndarray, ...]:
        """A copy of everything that `take` and `release` change, for `restore`."""
        return tuple(a.copy() for a in (self.home, self._owner, self._load, self._spent, self.picked))

    def restore(self, saved: tuple[np.ndarray, ...]) -> None:
        """Goes back to a saved state."""
        self.home, self._owner, self._load, self._spent, self.picked = saved
