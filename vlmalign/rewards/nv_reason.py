"""The rewards of the NV-Reason models as sets for a runner: chest radiographs (CXR) and computed tomography (CT).

Source: the training code NVIDIA publishes with them (NVIDIA-Medtech/NV-Reason-CXR and NV-Reason-CT; CXR also arXiv
2510.23968). Both train with GRPO on the sum of an accuracy and a length reward, each of weight 1.

What is different here, in both: the blocks are this project's (`<think>`, `<solution>` for their `<answer>`), labels
are read as `LabelReader` reads them, and white space around the blocks is allowed.
Left out: CT's anatomical regions (two label schemas in one run: use two tasks and a `truth` of None) and the report
headings it rewards in some runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from vlmalign.rewards.contract import MemoryReward, Reward
from vlmalign.rewards.labels import LabelOverlap
from vlmalign.rewards.length import LengthBand
from vlmalign.tasks.label_reader import LabelReader

#: name -> reward and its weight, as a `RewardRunner` takes them
RewardSet = Mapping[str, tuple[Reward | MemoryReward, float]]


def nv_reason_cxr(labels: tuple[str, ...] | LabelReader) -> RewardSet:
    """Jaccard index of the label sets (unknown names dropped, 1 if both are empty, 0 for unknown names only) where think
    and answer block stand alone, else 0; and max(-1, (n - 400) / 400) for n < 400 tokens."""
    return {"labels": (LabelOverlap(labels, alone=True), 1.0), "length": (LengthBand(low=400), 1.0)}


def nv_reason_ct(labels: tuple[str, ...] | LabelReader, normal: str = "No Finding") -> RewardSet:
    """F1 of the label sets, 0 where `normal` stands with another label, an empty answer meaning `normal`, unknown
    names counting as wrong; and a length band of 180 to 900 tokens that falls to -1 over 180 below and 300 above.

    Different here: the think block is required (CT accepts an answer block after any text).
    """
    overlap = LabelOverlap(labels, measure="f1", count_unknown=True, normal=normal, empty_is_normal=True)
    return {"labels": (overlap, 1.0), "length": (LengthBand(low=180, high=900, high_ramp=300), 1.0)}
