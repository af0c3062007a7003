"""The tables of rewards: name in a config -> what builds the reward. A new reward is one file and one line here.

A reward is called as `reward(prompts, completions, **columns)` with one entry per completion in every list and
returns one number per completion, or None where it does not apply; None takes no part in the advantage. It judges
each completion alone, keeps no memory between calls, does not change its arguments, and pickles, because chunks are
scored in worker processes. One that must remember is a `MemoryReward`, in the second table. The third holds sets of
rewards, which a config names as if they were one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vlmalign.rewards.chexreason import chexreason_nuanced
from vlmalign.rewards.choice import ChoiceReward
from vlmalign.rewards.collapse import label_collapse
from vlmalign.rewards.constraints import ConstraintShare
from vlmalign.rewards.contract import MemoryReward, Reward
from vlmalign.rewards.contradiction import Contradiction
from vlmalign.rewards.form import FormatReward
from vlmalign.rewards.hard import HardReward
from vlmalign.rewards.json_answer import JsonReward
from vlmalign.rewards.labels import LabelOverlap
from vlmalign.rewards.length import LengthBand
from vlmalign.rewards.macro_f1 import MacroF1Gain
from vlmalign.rewards.nuanced import NuancedReward
from vlmalign.rewards.nv_reason import RewardSet, nv_reason_ct, nv_reason_cxr
from vlmalign.rewards.pattern import PatternReward
from vlmalign.rewards.repetition import RepetitionPenalty
from vlmalign.rewards.robust import RobustOverlap

REWARDS: Mapping[str, Callable[..., Reward]] = MappingProxyType(
    {
        "choice": ChoiceReward,
        "constraints": ConstraintShare,
        "contradiction": Contradiction,
        "format": FormatReward,
        "hard": HardReward,
        "json": JsonReward,
        "labels": LabelOverlap,
        "length": LengthBand,
        "macro_f1": MacroF1Gain,
        "nuanced": NuancedReward,
        "pattern": PatternReward,
        "repetition": RepetitionPenalty,
        "robust": RobustOverlap,
    }
)

REWARDS_WITH_MEMORY: Mapping[str, Callable[..., MemoryReward]] = MappingProxyType({"collapse": label_collapse})

#: published sets of rewards with their weights, ready for a `RewardRunner`; a study calls their parts NAME_PART
REWARD_SETS: Mapping[str, Callable[..., RewardSet]] = MappingProxyType(
    {"chexreason_nuanced": chexreason_nuanced, "nv_reason_ct": nv_reason_ct, "nv_reason_cxr": nv_reason_cxr}
)

#: set -> the names of its parts, in order
SET_PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "chexreason_nuanced": ("nuanced", "collapse"),
        "nv_reason_ct": ("labels", "length"),
        "nv_reason_cxr": ("labels", "length"),
    }
)
