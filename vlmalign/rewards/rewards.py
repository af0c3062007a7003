"""The table of rewards: name in a config -> what builds the reward. A new reward is one file and one line here.

A reward is called as `reward(prompts, completions, **columns)` with one entry per completion in every list and
returns one number per completion, or None where it does not apply; None takes no part in the advantage. It keeps no
memory between calls, does not change its arguments, and pickles, because chunks are scored in worker processes.
Its `score` gives one completion's reward by component, as a record whose `total` is the reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from vlmalign.rewards.hard import HardReward

Reward = Callable[..., list[float | None]]

REWARDS: Mapping[str, Callable[..., Reward]] = MappingProxyType({"hard": HardReward})
