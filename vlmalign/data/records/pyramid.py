"""The Pyramid of records (arXiv 2511.18084): General, Confusion and Human Enhancement layers. The paper prints no rules.

Ours, for one decision of the records, its class y:

- Confusion: a classifier on the same fields takes another class to be at least as likely. Gradient-boosted trees judge each
  record out of fold, the patients of a fold being in no other: p(y) - max over other classes p <= margin.
- Enhancement: rare or complex. Rare: the share of y among the records is below `rare`. Complex: more than all but a share
  `complex` of the records has told fields that are filled, decisions (each name of a list), and earlier cycles (`counts`).
- General: neither.

A record may be confused and rare; it is drawn for Enhancement then, and both sizes and their overlap are reported. Confusion
comes of the answers, so it is of training sets, or of test sets that are described by it, never of a rule for the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from vlmalign.config import Config
from vlmalign.data.records.features import features, out_of_fold
from vlmalign.data.records.fields import CodeField
from vlmalign.data.records.records import Records

Layer = Literal["general", "confusion", "enhancement"]
LAYERS: tuple[Layer, ...] = ("general", "confusion", "enhancement")
Share = Annotated[float, Field(ge=0, le=1)]


class Pyramid(Config):
    """The rules."""

    decision: str  #: field whose classes are confused and rare
    folds: Annotated[int, Field(ge=2)] = 5
    margin: Annotated[float, Field(ge=-1, le=1)] = 0.0
    rare: Share = 0.05
    complex: Share = 0.1
    counts: tuple[str, ...] = ()  #: numbers that add to the complexity: earlier cycles


class Layers(NamedTuple):
    """Which records are in which layer."""

    confusion: np.ndarray  #: bool [records]
    enhancement: np.ndarray  #: bool [records]

    @property
    def general(self) -> np.ndarray:
        """bool [records]"""
        return ~(self.confusion | self.enhancement)

    def drawn_as(self) -> dict[str, np.ndarray]:
        """Layer -> bool [records], each record in one: what is confused and rare or complex is drawn for Enhancement."""
        return dict(zip(LAYERS, (self.general, self.confusion & ~self.enhancement, self.enhancement), strict=True))


def confused(probability: np.ndarray, classes: np.ndarray, *, margin: float = 0.0) -> np.ndarray:
    """Whether p(y) - max over other classes p <= margin: bool [records].

    >>> confused(np.array([[0.7, 0.3], [0.4, 0.6], [0.5, 0.5]]), np.array([0, 0, 1])).tolist()
    [False, True, True]
    """
    rows = np.arange(len(classes))
    own = probability[rows, classes]
    others = probability.copy()
    others[rows, classes] = -np.inf
    return own - others.max(axis=1) <= margin


def rare(classes: np.ndarray, *, share: float) -> np.ndarray:
    """Whether the class of a record has less than this share of all: bool [records].

    >>> rare(np.array([0] * 97 + [1] * 3), share=0.05).sum()
    np.int64(3)
    """
    return np.bincount(classes)[classes] < share * len(classes)


def above(score: np.ndarray, *, share: float) -> np.ndarray:
    """Whether more than all but this share of the records have less: bool [records]; ties at the bound are not in it.

    >>> above(np.array([3.0, 9.0, 4.0, 4.0]), share=0.25).tolist()
    [False, True, False, False]
    """
    return score > np.quantile(score, 1 - share, method="inverted_cdf")


def complexity(records: Records, counts: Sequence[str]) -> np.ndarray:
    """Filled fields that are told, decisions, and `counts`: float64 [records]."""
    given = [[value is not None for value in records.column(name)] for name in records.told]
    score = np.sum(given, axis=0, dtype=float)
    for name, field in records.fields.items():
        if field.role == "decision":
            values = records.column(name)
            score += [0 if value is None else len(value) if isinstance(value, list) else 1 for value in values]
    for name in counts:
        score += np.nan_to_num(records.column(name).astype(float))
    return score


def layers(records: Records, places: np.ndarray, rules: Pyramid, *, seed: int) -> tuple[Layers, dict[str, Any]]:
    """The layers of the records at `places`, and their report: sizes, overlap, and how well the trees did out of fold.

    Raises:
        ValueError: for rules that do not fit the schema, and a record without the decision.
    """
    from sklearn.metrics import accuracy_score, f1_score

    _check(records, rules)
    truth = records.column(rules.decision)[places]
    if unknown := sum(value is None for value in truth):
        raise ValueError(
            f"pyramid: {unknown} of {len(places)} records have no {rules.decision!r}, so no layer; require the field "
            f"(fields.{rules.decision}.required: true, on_bad: skip)"
        )
    words, classes = np.unique(truth.astype(str), return_inverse=True)
    told = features(records)
    matrix, patients = told.matrix[places], records.patients()[places].astype(str)
    probability = out_of_fold(
        matrix, classes, patients, categorical=told.categorical, of=len(words), folds=rules.folds, seed=seed
    )
    score = complexity(records, rules.counts)[places]
    found = Layers(
        confused(probability, classes, margin=rules.margin),
        rare(classes, share=rules.rare) | above(score, share=rules.complex),
    )
    predicted = probability.argmax(axis=1)
    report = {
        "records": len(places),
        "layers": {name: int(getattr(found, name).sum()) for name in LAYERS},
        "confusion and enhancement": int((found.confusion & found.enhancement).sum()),
        "confused by class": _shares(found.confusion, classes, words),
        "trees": {
            "accuracy": float(accuracy_score(classes, predicted)),
            "macro_f1": float(f1_score(classes, predicted, average="macro", zero_division=0)),
        },
    }
    return found, report


def draw_layers(found: Layers, sizes: Mapping[str, int], *, seed: int) -> dict[str, np.ndarray]:
    """Records of each layer at random: layer -> indices, ascending.

    Raises:
        ValueError: for a layer that has fewer.
    """
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, size in sizes.items():
        own = np.flatnonzero(found.drawn_as()[name])
        if len(own) < size:
            raise ValueError(
                f"layer {name}: {size} records were asked for, it has {len(own)}; lower parts.{name}, or change the rules"
            )
        drawn[name] = np.sort(rng.choice(own, size, replace=False))
    return drawn


def _check(records: Records, rules: Pyramid) -> None:
    field = records.fields.get(rules.decision)
    if not isinstance(field, CodeField) or field.role != "decision":
        known = [n for n, f in records.fields.items() if isinstance(f, CodeField) and f.role == "decision"]
        raise ValueError(
            f"pyramid.decision: {rules.decision!r} is no decision of kind code; those are {', '.join(known) or 'none'}"
        )
    for name in rules.counts:
        if name not in records.fields or records.fields[name].kind != "number":
            raise ValueError(f"pyramid.counts: {name!r} is no field of kind number")


def _shares(mask: np.ndarray, classes: np.ndarray, words: np.ndarray) -> dict[str, float]:
    return {str(word): float(mask[classes == number].mean()) for number, word in enumerate(words)}
