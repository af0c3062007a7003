"""Two systems on the same films: differences of their F1, and p-values adjusted for all that are printed together.

Two families, each adjusted by itself with Holm's method: "averages", every macro- and micro-F1 that is compared, and
"labels", every label's F1. A label with fewer than `FEWEST` positive films is never tested: its difference has no
p-value and belongs to no family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vlmalign.evaluation.bootstrap import bootstrap_ratio, holm, paired_difference
from vlmalign.evaluation.f1 import jaccard, label_matrix
from vlmalign.evaluation.results import says_something

Row = Mapping[str, Any]

#: positive films below which a label's F1 is shown, and not tested
FEWEST = 10
CORRECTION = "Holm"


def compare(
    first: Sequence[Row], second: Sequence[Row], subsets: Mapping[str, tuple[str, ...]], **bootstrap: Any
) -> list[dict[str, Any]]:
    """What `second` answered against what `first` did, one entry per label subset, as {"subset", "macro", "micro",
    "jaccard", "labels"}; each difference is a `Difference`, but that of the films' mean Jaccard, an `Interval` that belongs
    to no family of tests.

    Both hold the same films in the same order. "labels" (label, support, f1) stands in the first subset alone: a label's
    F1 is the same in every subset.
    """
    patients = [row["patient"] for row in first]
    found = []
    for number, (name, labels) in enumerate(subsets.items()):
        truth, one, two = (
            label_matrix([[label for label in row[key] if label in labels] for row in rows], labels)
            for rows, key in ((first, "truth"), (first, "predicted"), (second, "predicted"))
        )
        gap = paired_difference(truth, one, two, patients, **bootstrap)
        overlap = [jaccard(truth, matrix, says_something(rows)) for matrix, rows in ((one, first), (two, second))]
        overlap_gap = bootstrap_ratio((overlap[1] - overlap[0]).tolist(), [1.0] * len(truth), patients, **bootstrap)
        entry = {
            "subset": name,
            "macro": gap.macro._asdict(),
            "micro": gap.micro._asdict(),
            "jaccard": overlap_gap._asdict(),
        }
        if number == 0:
            entry["labels"] = [
                {"label": label, "support": int(support), "f1": _tested(f1._asdict(), int(support))}
                for label, support, f1 in zip(labels, truth.sum(axis=0), gap.label, strict=True)
            ]
        found.append(entry)
    return found


def adjust(differences: Sequence[dict[str, Any]], *, draws: int) -> dict[str, Any]:
    """Give every tested difference of `compare` its "p_holm", and return what was tested: the correction, the smallest
    p-value that so many draws can give, and the number of tests in each family."""
    families = {"averages": list(_averages(differences)), "labels": list(_labels(differences))}
    for tests in families.values():
        for test, p in zip(tests, holm([test["p"] for test in tests]), strict=True):
            test["p_holm"] = p
    return {
        "correction": CORRECTION,
        "families": {name: len(tests) for name, tests in families.items()},
        "smallest_p": 2 / (draws + 1),
        "fewest_positives": FEWEST,
    }


def _tested(difference: dict[str, Any], support: int) -> dict[str, Any]:
    return difference if support >= FEWEST else {**difference, "p": None}


def _averages(differences: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in differences:
        yield from (row[name] for name in ("macro", "micro") if row[name]["p"] is not None)


def _labels(differences: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in differences:
        yield from (label["f1"] for label in row.get("labels", ()) if label["f1"]["p"] is not None)
