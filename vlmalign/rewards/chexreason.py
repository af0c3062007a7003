"""ChexReason's whole nuanced reward as a set for a runner: its terms for one completion, and its collapse term."""

from __future__ import annotations

from vlmalign.rewards.collapse import label_collapse
from vlmalign.rewards.frequency import Frequency
from vlmalign.rewards.nuanced import NuancedReward
from vlmalign.rewards.nv_reason import RewardSet
from vlmalign.tasks.label_reader import LabelReader


def chexreason_nuanced(
    labels: tuple[str, ...] | LabelReader,
    frequency: Frequency = "training",
    false_positive: float = 100.0,
    outside_text: float = 25.0,
    invalid: float = 100.0,
    everyone: bool = True,
) -> RewardSet:
    """`NuancedReward` plus `label_collapse`, each of weight 1 (arXiv 2512.23090).

    The arguments are what the paper leaves open. `everyone`: all completions pay for a dominant label, those that name
    another one too; the same amount for a whole group has no gradient in GRPO. With False only those that name it pay.
    """
    nuanced = NuancedReward(labels, frequency, false_positive, outside_text, invalid)
    return {"nuanced": (nuanced, 1.0), "collapse": (label_collapse(labels, everyone=everyone), 1.0)}
