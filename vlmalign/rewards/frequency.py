"""How frequent each label is: given by hand, or counted in the films that a stage trains on. Shares lie in [0, 1]."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

#: share of films with each label, by label or in the order of the labels; "training": a study counts them in the set
#: that the stage trains on, before it starts
Frequency = Mapping[str, float] | tuple[float, ...] | Literal["training"]


def check_frequency(labels: Sequence[str], frequency: Frequency) -> None:
    """Raises ValueError where `frequency` does not give every label a share in [0, 1], and gives no others one."""
    if frequency == "training":
        return
    if isinstance(frequency, Mapping):
        if wrong := sorted(set(frequency) ^ set(labels)):
            what = "is no label" if wrong[0] in frequency else "has no share"
            raise ValueError(f"frequency must hold a share for each of {tuple(labels)}: {wrong[0]!r} {what}")
        values: Sequence[float] = list(frequency.values())
    else:
        values = frequency
    if len(values) != len(labels) or not all(0 <= share <= 1 for share in values):
        raise ValueError(f"frequency must hold a share in [0, 1] for each of {tuple(labels)}, found {frequency}")


def shares(labels: Sequence[str], frequency: Frequency) -> dict[str, float]:
    """Label -> share of films, in the order of `labels`. Raises ValueError for shares still to be counted.

    >>> shares(("Fracture", "Edema"), (0.1, 0.3))
    {'Fracture': 0.1, 'Edema': 0.3}
    """
    if frequency == "training":
        raise ValueError("frequency: training is counted by a study; outside of one give each label's share")
    if isinstance(frequency, Mapping):
        return {label: frequency[label] for label in labels}
    return dict(zip(labels, frequency, strict=True))


def inverse(labels: Sequence[str], frequency: Frequency, rarest: float) -> dict[str, float]:
    """Label -> 1 / share, where shares below `rarest` count as `rarest`: one film of a label does not outweigh the rest.

    >>> inverse(("Fracture", "Edema"), (0.0, 0.5), rarest=0.01)
    {'Fracture': 100.0, 'Edema': 2.0}
    """
    return {label: 1 / max(share, rarest) for label, share in shares(labels, frequency).items()}


def check_rarest(rarest: float) -> None:
    """Raises ValueError for a lowest share that bounds no weight."""
    if not 0 < rarest <= 1:
        raise ValueError(f"rarest is the lowest share that counts and must lie in (0, 1], found {rarest}")


def counted(labels: Sequence[str], truth: Iterable[Iterable[str] | None]) -> dict[str, float]:
    """Label -> share of the films with it. Films whose truth is None are those of another task and are left out.

    Raises ValueError when no film is left.

    >>> counted(("Fracture", "Edema"), [["Edema"], ["Edema", "Fracture"], [], None, []])
    {'Fracture': 0.25, 'Edema': 0.5}
    """
    films = [frozenset(labels) for labels in truth if labels is not None]
    if not films:
        raise ValueError("frequency: training needs films with a truth to count labels in, found none; give the shares")
    counts = Counter(label for film in films for label in film)
    return {label: counts[label] / len(films) for label in labels}
