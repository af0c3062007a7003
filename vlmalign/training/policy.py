"""Optimiser batches for GRPO: prompts -> rollout of the current policy -> rewards -> advantages -> groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np

from vlmalign.data.pipeline import Position, shuffled_batches
from vlmalign.models.lora import merge_adapter
from vlmalign.models.model import Params
from vlmalign.objectives.advantages import group_advantages
from vlmalign.randomness import key_for
from vlmalign.rollout.completions import Completion, Generator
from vlmalign.training.loop import Work
from vlmalign.training.step import MicroBatch
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.types import Group, GroupBatch, Segment


class Task(NamedTuple):
    """A prompt that waits for completions, and the columns its reward needs."""

    prompt: Group
    text: str  #: the prompt as the reward sees it
    columns: Mapping[str, Any]


class Scored(NamedTuple):
    """A reward for every completion (None: could not be scored) and named parts of it, for the log."""

    rewards: Sequence[float | None]
    parts: Mapping[str, Sequence[float]]


#: (prompts, completions, columns with one entry per completion) -> rewards, in the same order
Score = Callable[[list[str], list[str], dict[str, list[Any]]], Scored]


@dataclass(frozen=True)
class RolloutSettings:
    """`prompts` per update; `scale` as in `advantages.SCALES`."""

    prompts: int
    scale: str = "none"
    seed: int = 0


class PolicySource:
    """Rolls out the adapted model, merged once per update, and turns rewards into advantages over whole groups."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        generator: Generator,
        base: Params,
        lora_scale: float,
        decode: Callable[[np.ndarray], str],
        score: Score,
        shapes: Shapes,
        settings: RolloutSettings,
    ):
        self._batches: Position = shuffled_batches(tasks, batch=settings.prompts, seed=settings.seed)
        self._generator, self._base, self._decode, self._score = generator, base, decode, score
        self._shapes, self._settings = shapes, settings
        self._merge = jax.jit(lambda base, adapter: merge_adapter(base, adapter, lora_scale))

    def work(self, step: int, params: Params) -> Work:
        tasks: list[Task] = next(self._batches)
        merged = self._merge(self._base, params)
        key = key_for(self._settings.seed, step, "rollout")
        rollouts = self._generator.run(merged, [task.prompt for task in tasks], key)
        flat = [completion for row in rollouts for completion in row]
        size = self._generator.group
        columns: dict[str, list[Any]] = {
            name: [task.columns[name] for task in tasks for _ in range(size)] for name in tasks[0].columns
        }
        columns["completion_tokens"] = [len(c.tokens) for c in flat]
        prompts = [task.text for task in tasks for _ in range(size)]
        scored = self._score(prompts, [self._decode(c.tokens) for c in flat], columns)
        rewards = np.array([np.nan if r is None else r for r in scored.rewards], np.float64).reshape(-1, size)
        advantages = group_advantages(rewards, scale=self._settings.scale)

        groups = [
            replace(task.prompt, continuations=tuple(map(_segment, row)))
            for task, row in zip(tasks, rollouts, strict=True)
        ]
        by_id = {g.id: (a, row) for g, a, row in zip(groups, advantages.value, rollouts, strict=True)}
        batches = [
            _with_rollout(batch, by_id) for batch in micro_batches(groups, self._shapes, self._generator.features)
        ]
        return Work(batches, _metrics(rewards, advantages.flat, flat, scored))

    def get_state(self) -> dict[str, Any]:
        return {"data": self._batches.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state["data"])


def _segment(completion: Completion) -> Segment:
    tokens = completion.tokens.astype(np.int32)
    return Segment(tokens, np.full(tokens.shape, -1, np.int32), np.ones(tokens.shape, np.float32))


def _with_rollout(batch: GroupBatch, by_id: Mapping[int, tuple[np.ndarray, list[Completion]]]) -> MicroBatch:
    """The batch with its advantages, and the log-probabilities recorded while sampling."""
    rows, group, completion = batch.weight.shape
    advantage = np.zeros((rows, group), np.float32)
    logp = np.zeros((rows, group, completion), np.float32)
    for row, number in enumerate(batch.group_id):
        if number >= 0:
            advantage[row], completions = by_id[int(number)]
            for k, found in enumerate(completions):
                logp[row, k, : len(found.logp)] = found.logp
    return MicroBatch(batch._replace(advantage=advantage), {"rollout_logp": logp})


def _metrics(
    rewards: np.ndarray, flat_groups: np.ndarray, completions: Sequence[Completion], scored: Scored
) -> dict[str, float | None]:
    known = rewards[np.isfinite(rewards)]
    lengths = np.array([len(c.tokens) for c in completions])
    return {
        "reward": float(known.mean()) if known.size else None,
        "reward_std": float(known.std()) if known.size else None,
        "unscored": float(rewards.size - known.size),
        **{name: float(np.mean(values)) for name, values in scored.parts.items()},
        "length": float(lengths.mean()),
        "stopped": float(np.mean([c.stopped for c in completions])),
        "flat_groups": float(flat_groups.mean()),
    }
