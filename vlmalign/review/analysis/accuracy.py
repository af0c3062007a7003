"""The accuracy of each arm, from the `results.json` of the run that gave its answers: the other axis of the decoupling plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.reporting.record import Scores
from vlmalign.reporting.score_file import numbers, read_scores
from vlmalign.review.protocol import Protocol, RunArm


class Accuracy(NamedTuple):
    name: str  #: of the score
    arms: Mapping[str, Mapping[str, Any]]  #: arm -> value, low, high; arms that were not scored are not in it


def read_accuracy(path: Path, protocol: Protocol, name: str | None = None) -> Accuracy:
    """The score `name` of every arm that the file has: an arm of a run by its stage and set, another by its own name.

    Without a name: accuracy where there is one, else the first score of the first arm (for labels, macro-F1).

    Raises:
        ValueError: for a file that is missing or malformed, that scores none of the arms, or has no such score.
    """
    scores = read_scores(path)
    if scores is None:
        raise ValueError(f"{path}: expected the results.json of scored answers, found no file")
    found = {arm: _scores(scores, protocol, arm) for arm in protocol.arms}
    found = {arm: own for arm, own in found.items() if own}
    if not found:
        raise ValueError(
            f"{path}: expected scores of {', '.join(protocol.arms)} (by stage and set), found none of them"
        )
    first = next(iter(found.values()))
    name = name or ("accuracy" if "accuracy" in first else next(iter(first)))
    arms = {arm: own[name] for arm, own in found.items() if name in own and own[name]["value"] is not None}
    if not arms:
        raise ValueError(f"{path}: expected a score {name!r}, found {', '.join(first)}")
    return Accuracy(name, arms)


def _scores(scores: Scores, protocol: Protocol, arm: str) -> dict[str, Mapping[str, Any]]:
    own = protocol.arms[arm]
    if isinstance(own, RunArm):
        results = scores.results.get(own.set, {}).get(own.stage)
    else:
        there = [by_stage[arm] for by_stage in scores.results.values() if arm in by_stage]
        results = there[0] if len(there) == 1 else None
    if results is None:
        return {}
    if "blocks" not in results:
        return numbers(results)
    block = max(results["blocks"].values(), key=lambda block: len(block["labels"]))
    return {"macro-F1": block["macro"], "micro-F1": block["micro"]}
