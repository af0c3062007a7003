"""How much two sets of labels overlap: Jaccard index or F1, with equal or given weights of the labels; in [0, 1]."""

from __future__ import annotations

from collections.abc import Mapping

MEASURES = ("jaccard", "f1")


def check_measure(measure: str) -> None:
    """Raises ValueError for a measure that is not known."""
    if measure not in MEASURES:
        raise ValueError(f"measure must be {' or '.join(MEASURES)}, found {measure!r}")


def overlap(
    measure: str, first: frozenset[str], second: frozenset[str], weights: Mapping[str, float] | None = None
) -> float:
    """The measure of this name; 1 when both sets are empty, 0 when one of them is.

        jaccard = w(first n second) / w(first u second)        f1 = 2 w(first n second) / (w(first) + w(second))

    w(S) is the sum of the weights of the labels in S, which `weights` must hold; without `weights` it is their number.

    >>> overlap("jaccard", frozenset({"Edema", "Fracture"}), frozenset({"Edema"}), {"Edema": 2.0, "Fracture": 10.0})
    0.16666666666666666
    """
    if weights is None:
        return jaccard(first, second) if measure == "jaccard" else set_f1(first, second)
    if not first | second:
        return 1.0
    # In the order of the weights, not of a set: sums of floats must not depend on the process's hash seed.
    both = sum(weight for label, weight in weights.items() if label in first and label in second)
    total = sum(weight * ((label in first) + (label in second)) for label, weight in weights.items())
    return both / (total - both) if measure == "jaccard" else 2 * both / total


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """|first n second| / |first u second|, in [0, 1]; 1 when both are empty (two films agreed to be clear agree).

    >>> jaccard(frozenset({"Edema", "Fracture"}), frozenset({"Edema"}))
    0.5
    """
    union = first | second
    return len(first & second) / len(union) if union else 1.0


def set_f1(first: frozenset[str], second: frozenset[str]) -> float:
    """2 |first n second| / (|first| + |second|), in [0, 1]; 1 when both are empty.

    >>> set_f1(frozenset({"Edema", "Fracture"}), frozenset({"Edema"}))
    0.6666666666666666
    """
    total = len(first) + len(second)
    return 2 * len(first & second) / total if total else 1.0
