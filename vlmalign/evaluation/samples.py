"""Several answers to each film: majority vote, pass@k, and label probabilities with AUROC and calibration.

With K samples of a film, a label's **probability** is the share of them that name it, or the mean of the probabilities that
their rows give; one that is not valid names nothing and counts. The **majority vote** names the labels that more than half name (a tie does not), and is valid where more than
half are. **pass@k** is the chance that one of k samples is exactly right; with c right ones among K its unbiased estimate
(Chen et al., Evaluating Large Language Models Trained on Code, 2021, eq. 1), averaged over films, is

    1 - C(K - c, k) / C(K, k)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import comb
from typing import Any

import numpy as np

from vlmalign.evaluation.auroc import bootstrap_auroc
from vlmalign.evaluation.bootstrap import bootstrap_ratio
from vlmalign.evaluation.calibration import expected_calibration_error, reliability
from vlmalign.evaluation.f1 import label_matrix

Row = Mapping[str, Any]

PROBABILITY = "share of the samples that name the label"
FIRST_TOKEN = "probability of the label's first token at <solution>, given the reasoning; the mean over samples"


def majority_vote(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row for each film, in the order of first appearance: what more than half of its samples say.

    Raises ValueError for films with different numbers of samples.
    """
    found = []
    for samples in _by_film(rows):
        first = samples[0]
        predicted, unknown = (
            [
                name
                for name, count in Counter(name for row in samples for name in dict.fromkeys(row.get(key, ()))).items()
                if 2 * count > len(samples)
            ]
            for key in ("predicted", "unknown")
        )
        valid = 2 * sum(row["valid"] for row in samples) > len(samples)
        kept = {key: first[key] for key in ("stage", "dataset", "id", "patient", "truth") if key in first}
        found.append({**kept, "predicted": predicted, "valid": valid, "unknown": unknown})
    return found


def score_samples(
    rows: Sequence[Row],
    labels: Sequence[str],
    *,
    subsets: Mapping[str, tuple[str, ...]] | None = None,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    given: bool = False,
) -> dict[str, Any]:
    """What several samples of a film tell beyond their vote: "n" samples, "fail_rate" of single samples, "pass_at_k" (a
    list of intervals with their k), what "probability" means, and "blocks", one per label subset, of "macro_auroc",
    "macro_labels", "ece", "bins" and "per_label". `given`: a label's probability is the mean of those in the rows
    ("probability": label -> number, null counting as 0), not the share of samples that name it."""
    films = _by_film(rows)
    patients = [samples[0]["patient"] for samples in films]
    truth = label_matrix([samples[0]["truth"] for samples in films], tuple(labels))
    votes = np.stack([(_given if given else _shares)(samples, tuple(labels)) for samples in films])
    settings = {"draws": draws, "level": level, "seed": seed}
    blocks = {}
    for name, subset in ({"all": tuple(labels)} if subsets is None else subsets).items():
        columns = [list(labels).index(label) for label in subset]
        true, probability = truth[:, columns], votes[:, columns]
        aurocs = bootstrap_auroc(true, probability, patients, **settings)
        blocks[name] = {
            "macro_auroc": aurocs.macro._asdict(),
            "macro_labels": aurocs.macro_labels,
            "ece": expected_calibration_error(true, probability),
            "bins": [
                {**each._asdict(), "share": each.share._asdict()}
                for each in reliability(true, probability, patients, **settings)
            ],
            "per_label": [
                {
                    "label": label,
                    "support": int(true[:, place].sum()),
                    "auroc": aurocs.label[place]._asdict(),
                    "ece": expected_calibration_error(true[:, place], probability[:, place]),
                }
                for place, label in enumerate(subset)
            ],
        }
    count = len(films[0])
    right = [sum(map(_exactly_right, samples)) for samples in films]
    return {
        "n": count,
        "fail_rate": sum(not row["valid"] for row in rows) / len(rows),
        "pass_at_k": [
            {
                "k": k,
                **bootstrap_ratio(
                    [pass_at_k(count, c, k) for c in right], [1] * len(films), patients, **settings
                )._asdict(),
            }
            for k in _ks(count)
        ],
        "probability": FIRST_TOKEN if given else PROBABILITY,
        "blocks": blocks,
    }


def _shares(samples: Sequence[Row], labels: tuple[str, ...]) -> np.ndarray:
    """Of a film's samples, those that name each label."""
    return label_matrix([row["predicted"] for row in samples], labels).mean(axis=0)


def _given(samples: Sequence[Row], labels: tuple[str, ...]) -> np.ndarray:
    """The mean of the probabilities in a film's rows; an answer that is not valid has none."""
    return np.mean([[(row["probability"] or {}).get(label, 0.0) for label in labels] for row in samples], axis=0)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k samples is right, from `right` right ones among `samples`.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 3, 2)
    (0.25, 0.5, 1.0)
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k must lie between 1 and the number of samples {samples}, found {k}")
    return 1 - comb(samples - right, k) / comb(samples, k)


def _ks(samples: int) -> list[int]:
    """1, 2, 4, ... and the number of samples itself.

    >>> _ks(6)
    [1, 2, 4, 6]
    """
    return sorted({*(1 << power for power in range(samples.bit_length()) if 1 << power <= samples), samples})


def _by_film(rows: Sequence[Row]) -> list[list[Row]]:
    films: dict[str, list[Row]] = {}
    for row in rows:
        films.setdefault(row["id"], []).append(row)
    counts = Counter(map(len, films.values()))
    if len(counts) != 1:
        raise ValueError(
            f"expected as many samples of each film, found films with {', '.join(map(str, sorted(counts)))}; answer again"
        )
    return list(films.values())


def _exactly_right(row: Row) -> bool:
    """As in `f1.evaluate`: an answer of unknown names only is not right, not even where the true set is empty."""
    only_unknown = bool(row.get("unknown")) and not row["predicted"]
    return row["valid"] and not only_unknown and set(row["predicted"]) == set(row["truth"])
