"""Iterative stratification: parts of a table in which every label keeps the share that it has in the whole.

Sechidis, Tsoumakas and Vlahavas 2011, "On the Stratification of Multi-Label Data" (ECML PKDD, LNCS 6913), algorithm 1. It
is what balanced sets are compared with: it keeps the imbalance that they are drawn to remove, and knows no patients.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def stratify(labels: np.ndarray, sizes: Sequence[int], *, seed: int) -> list[np.ndarray]:
    """Parts of about these sizes: rows of each, ascending; what is in no part is left over.

    The label with fewest films left comes first. Each of its films goes to the part that wants most films of the label;
    of equal ones, to the part that wants most films; of equal ones, by `seed`. Films without labels fill the parts up.

    Args:
        labels: [films, labels] bool.
        sizes: films wanted in each part, no more than there are in all; a part ends a few films off.

    >>> parts = stratify(np.repeat(np.eye(2, dtype=bool), [80, 20], axis=0), [10, 40], seed=0)
    >>> [[int((part < 80).sum()), int((part >= 80).sum())] for part in parts]
    [[8, 2], [32, 8]]
    """
    films = len(labels)
    if sum(sizes) > films:
        raise ValueError(f"expected parts of {films} films or fewer in all, found sizes {list(sizes)}")
    rng = np.random.default_rng(seed)
    wanted = [*map(float, sizes), float(films - sum(sizes))]
    label_counts = labels.sum(0)
    wanted_labels = [[size / films * count for size in wanted] for count in label_counts.tolist()]
    order = rng.permutation(films)  # films of one label have no order in the paper
    of_film = [np.flatnonzero(row).tolist() for row in labels[order]]
    with_label = [np.flatnonzero(column).tolist() for column in labels[order].T]
    left = label_counts.copy()
    part = np.full(films, -1)

    def place(film: int, wishes: Sequence[float]) -> None:
        most = max(wishes)
        best = [each for each, wish in enumerate(wishes) if wish == most]
        most = max(wanted[each] for each in best)
        best = [each for each in best if wanted[each] == most]
        chosen = best[0] if len(best) == 1 else best[int(rng.integers(len(best)))]
        part[order[film]] = chosen
        wanted[chosen] -= 1
        for label in of_film[film]:
            wanted_labels[label][chosen] -= 1
            left[label] -= 1

    while left.any():
        label = int(np.where(left > 0, left, films + 1).argmin())
        for film in with_label[label]:
            if part[order[film]] < 0:
                place(film, wanted_labels[label])
    for film in range(films):
        if part[order[film]] < 0:
            place(film, wanted)
    return [np.flatnonzero(part == each) for each in range(len(sizes))]
