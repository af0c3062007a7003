"""What a rollout measured, as numbers of the metrics line: rewards, lengths, and what sampling computed in vain."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vlmalign.rollout.merge_check import LogpGap
from vlmalign.rollout.statistics import RolloutStats
from vlmalign.shapes import Float
from vlmalign.training.rollouts import Rollout, Sampled


def reward_table(rollouts: Sequence[Rollout]) -> Float[np.ndarray, "groups k"]:
    """NaN where a completion could not be scored."""
    return np.stack([r.rewards for r in rollouts])


def rollout_metrics(sampled: Sampled, stats: RolloutStats, gap: LogpGap | None) -> dict[str, float | None]:
    """By name; `stats` are those of all rounds of sampling, `gap` that of the merged policy where it is known already.

    Raises:
        ValueError: when a reward has a name that stands for a number of the rollout.
    """
    rollouts = sampled.rollouts
    rewards = reward_table(rollouts)
    known = rewards[np.isfinite(rewards)]
    completions = [c for r in rollouts for c in r.completions]
    numbers = {
        "reward": _mean(rewards),
        "reward_std": float(known.std()) if known.size else None,
        "unscored": float(rewards.size - known.size),
        "reward_faults": float(sampled.faults),
        "length": float(np.mean([len(c.tokens) for c in completions])),
        "stopped": float(np.mean([c.stopped for c in completions])),
        "flat_groups": float(sampled.flat.mean()),
        "attempts": float(sampled.attempts),
        "groups_drawn": float(sampled.drawn),
        "decoded_used": stats.decoded_used,
        "prefill_used": stats.prefill_used,
        "cache_moves": float(stats.moves),
    }
    if gap is not None:
        numbers |= {"rollout_gap": gap.mean, "rollout_gap_max": gap.largest}
    parts = {name: _mean(np.concatenate([r.parts[name] for r in rollouts])) for name in rollouts[0].parts}
    if taken := numbers.keys() & parts.keys():
        raise ValueError(f"the metrics hold numbers called {', '.join(sorted(taken))} already; rename those rewards")
    return {**numbers, **parts}


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None
