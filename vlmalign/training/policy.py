"""Optimiser batches for GRPO and PPO: roll out the current policy, score the answers, give every token its advantage.

One rollout serves `updates` optimiser steps. With more than one, log-probabilities of the policy that sampled are
recorded once, before the first, and a checkpoint may only be made between rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from vlmalign.data.pipeline import Position, shuffled_batches
from vlmalign.models.lora import merge_adapter
from vlmalign.models.model import Params
from vlmalign.objectives.advantages import combined_advantages, group_advantages, leave_one_out_advantages
from vlmalign.objectives.entropy import top_entropy_masks
from vlmalign.objectives.gae import estimate_advantages, token_rewards, whiten
from vlmalign.objectives.kl import kl_per_token, rewards_less_kl
from vlmalign.objectives.names import require_known
from vlmalign.randomness import key_for
from vlmalign.rollout.completions import Completion, Generator
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.loop import Work
from vlmalign.training.rollouts import Rollout, Sampled, Sampler, Score, Task
from vlmalign.training.step import MicroBatch, Trainer
from vlmalign.training.supervised import Shapes, micro_batches
from vlmalign.training.value_head import split_value_head
from vlmalign.types import Group, GroupBatch, Scores, Segment

ADVANTAGES = ("group", "leave_one_out", "token")


@dataclass(frozen=True)
class RolloutSettings:
    """What is sampled for an optimiser batch, and what its completions are compared with."""

    prompts: int  #: per optimiser batch
    updates: int = 1  #: optimiser steps on one rollout
    attempts: int = 1  #: rounds of dynamic sampling; 1: none
    overlong_buffer: int | None = None  #: tokens before the limit from which length costs reward; None: no penalty
    advantage: str = "group"  #: "group", "leave_one_out" (RLOO), or "token" (GAE with a value head: PPO)
    scale: str = "none"  #: of group advantages, as in `advantages.SCALES`
    ddof: int = 1  #: 1: Bessel's standard deviation, 0: the population's
    normalise_first: Mapping[str, float] | None = None  #: GDPO: normalise these rewards apart, with these weights
    kl_in_reward: float = 0.0  #: weight of the KL to the reference in the reward (needs a reference)
    kl: str = "k1"  #: estimator of that KL
    top_entropy: float = 1.0  #: share of tokens, by entropy, that carry the policy term
    gamma: float = 1.0  #: of GAE
    lam: float = 0.95  #: of GAE
    seed: int = 0

    def __post_init__(self) -> None:
        require_known("advantage", self.advantage, ADVANTAGES)
        for name in ("prompts", "updates", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, found {getattr(self, name)}")
        if self.advantage != "group" and (self.normalise_first is not None or self.scale != "none"):
            raise ValueError(f"scale and normalise_first belong to group advantages, found {self.advantage!r}")

    @property
    def scores_first(self) -> bool:
        """The policy that sampled scores its completions before the first update."""
        return self.updates > 1 or self.kl_in_reward > 0 or self.top_entropy < 1 or self.advantage == "token"


class PolicySource:
    """Rolls out the adapted model, merged once per rollout, and turns rewards into advantages over whole groups."""

    def __init__(
        self,
        tasks: Sequence[Task],
        *,
        generator: Generator,
        trainer: Trainer,
        base: Params,
        decode: Callable[[np.ndarray], str],
        score: Score,
        shapes: Shapes,
        settings: RolloutSettings,
        log: CompletionLog | None = None,
    ):
        if generator.group < 2 and settings.advantage != "token":
            raise ValueError(
                f"a group needs at least 2 completions to compare, found {generator.group}; raise rollout.group"
            )
        if settings.kl_in_reward > 0 and trainer.reference is None:
            raise ValueError("kl_in_reward compares with a reference policy; none was given")
        self._batches: Position = shuffled_batches(tasks, batch=settings.prompts, seed=settings.seed)
        self._generator, self._trainer, self._base = generator, trainer, base
        self._decode, self._score, self._shapes, self._settings = decode, score, shapes, settings
        self._log = log
        lora = trainer.model.lora
        self._merge = None if lora is None else jax.jit(lambda base, adapter: merge_adapter(base, adapter, lora.scale))
        self._held: list[MicroBatch] = []
        self._used = 0  #: updates made of what is held

    def work(self, step: int, params: Params) -> Work:
        if step % self._settings.updates:
            self._used += 1
            return Work(self._held, {"update": self._used})
        if step == 0 and self._log is not None:
            self._log.rewind(0)
        sampled = self._sample(step, params)
        self._held, advantages = self._batch(sampled, params)
        self._used = 1
        if self._log is not None:
            self._log.write(step + 1, sampled.rollouts, advantages)
        return Work(self._held, {"update": 1, **_metrics(sampled)})

    def get_state(self) -> dict[str, Any]:
        if self._used % self._settings.updates:
            raise ValueError(
                f"a checkpoint between the {self._settings.updates} updates of one rollout cannot be continued; "
                "make checkpoint_every and evaluate_every multiples of updates"
            )
        log = None if self._log is None else self._log.position()
        return {"data": self._batches.get_state(), "completions": log}

    def set_state(self, state: dict[str, Any]) -> None:
        self._batches.set_state(state["data"])
        if self._log is not None and state["completions"] is not None:
            self._log.rewind(state["completions"])

    def _sample(self, step: int, params: Params) -> Sampled:
        policy, _ = split_value_head(params)
        merged = {**self._base, **policy} if self._merge is None else self._merge(self._base, policy)
        key = key_for(self._settings.seed, step, "rollout")

        def generate(prompts: Sequence[Group], attempt: int) -> list[list[Completion]]:
            # A prompt that is drawn again must not be answered again with the same draws.
            return self._generator.run(merged, prompts, jax.random.fold_in(key, attempt) if attempt else key)

        sampler = Sampler(
            generate=generate,
            decode=self._decode,
            score=self._score,
            wanted=self._settings.prompts,
            attempts=self._settings.attempts,
            longest=self._generator.completion,
            overlong_buffer=self._settings.overlong_buffer,
        )
        return sampler.draw(step, self._batches)

    def _batch(self, sampled: Sampled, params: Params) -> tuple[list[MicroBatch], np.ndarray]:
        """Micro-batches with everything recorded, and the advantages [groups, K] for the log."""
        settings, rollouts = self._settings, sampled.rollouts
        # Numbered anew: dynamic sampling may bring the same prompt twice.
        groups = [
            replace(r.task.prompt, id=i, continuations=tuple(map(_segment, r.completions)))
            for i, r in enumerate(rollouts)
        ]
        batches = [
            _recorded(batch, rollouts) for batch in micro_batches(groups, self._shapes, self._generator.features)
        ]
        rewards = np.stack([r.rewards for r in rollouts])
        if settings.scores_first:
            scores = [jax.device_get(self._trainer.scores(params, self._base, b.groups)) for b in batches]
            batches = [
                b._replace(recorded={**b.recorded, "old_logp": s.logp}) for b, s in zip(batches, scores, strict=True)
            ]
            if settings.top_entropy < 1:
                masks = [b.groups.weight > 0 for b in batches]
                chosen = top_entropy_masks([s.entropy for s in scores], masks, share=settings.top_entropy)
                batches = [
                    b._replace(groups=b.groups._replace(entropy_mask=m)) for b, m in zip(batches, chosen, strict=True)
                ]
            batches, kl = self._with_kl(batches)
            if settings.advantage == "token":
                return self._with_token_advantages(batches, scores, rewards, kl)
            if settings.kl_in_reward > 0:
                rewards = _by_group(
                    batches,
                    [
                        rewards_less_kl(_rows(b, rewards), k, beta=settings.kl_in_reward)
                        for b, k in zip(batches, kl, strict=True)
                    ],
                    rewards,
                )
        advantages = self._advantages(rewards, rollouts)
        return [_with_advantage(b, advantages) for b in batches], advantages

    def _advantages(self, rewards: np.ndarray, rollouts: Sequence[Rollout]) -> np.ndarray:
        settings = self._settings
        if settings.advantage == "leave_one_out":
            return leave_one_out_advantages(rewards).value
        if settings.normalise_first is None:
            return group_advantages(rewards, scale=settings.scale, ddof=settings.ddof).value
        parts = np.stack(
            [np.stack([r.parts[name] for r in rollouts]) for name in settings.normalise_first], axis=-1
        )  # [groups, K, rewards]
        weights = np.array(list(settings.normalise_first.values()))
        return combined_advantages(parts, weights, aggregation="normalise_then_sum", ddof=settings.ddof).value

    def _with_kl(self, batches: list[MicroBatch]) -> tuple[list[MicroBatch], list[np.ndarray]]:
        """The reference's log-probabilities, recorded, and the KL of every token; zeros when rewards hold none."""
        if self._settings.kl_in_reward == 0:
            return batches, [np.zeros(b.groups.weight.shape) for b in batches]
        found, kl = [], []
        for batch in batches:
            ref = np.asarray(self._trainer.reference_logp(self._base, batch.groups))
            found.append(batch._replace(recorded={**batch.recorded, "ref_logp": ref}))
            old = batch.recorded["old_logp"]
            kl.append(kl_per_token(old, ref, batch.groups.weight, kind=self._settings.kl))
        return found, kl

    def _with_token_advantages(
        self, batches: list[MicroBatch], scores: list[Scores], rewards: np.ndarray, kl: list[np.ndarray]
    ) -> tuple[list[MicroBatch], np.ndarray]:
        settings = self._settings
        found = []
        for batch, score, penalty in zip(batches, scores, kl, strict=True):
            own = _rows(batch, rewards)
            # A completion that could not be scored teaches nothing.
            weight = np.where(np.isfinite(own)[..., None], batch.groups.weight, 0.0).astype(np.float32)
            per_token = token_rewards(own, weight, kl=penalty, beta=settings.kl_in_reward)
            estimated = estimate_advantages(per_token, score.values, weight, gamma=settings.gamma, lam=settings.lam)
            recorded = {**batch.recorded, "old_values": score.values, "returns": estimated.returns}
            found.append((MicroBatch(batch.groups._replace(weight=weight), recorded), estimated.advantage))
        whitened = whiten([a for _, a in found], [b.groups.weight for b, _ in found])
        done = [b._replace(recorded={**b.recorded, "advantage": a}) for (b, _), a in zip(found, whitened, strict=True)]
        means = [a.sum(-1) / np.maximum((b.groups.weight > 0).sum(-1), 1) for b, a in zip(done, whitened, strict=True)]
        return done, _by_group(done, means, np.zeros_like(rewards))


def _segment(completion: Completion) -> Segment:
    tokens = completion.tokens.astype(np.int32)
    return Segment(tokens, np.full(tokens.shape, -1, np.int32), np.ones(tokens.shape, np.float32))


def _recorded(batch: GroupBatch, rollouts: Sequence[Rollout]) -> MicroBatch:
    """The batch with what was recorded while sampling: log-probabilities, and which completions were cut off."""
    rows, group, _ = batch.weight.shape
    truncated = np.zeros((rows, group), bool)
    found = {name: np.zeros(batch.weight.shape, np.float32) for name in ("rollout_logp", "kept_logp")}
    for row, number in enumerate(batch.group_id):
        if number >= 0:
            for k, completion in enumerate(rollouts[int(number)].completions):
                truncated[row, k] = not completion.stopped
                found["rollout_logp"][row, k, : len(completion.logp)] = completion.logp
                found["kept_logp"][row, k, : len(completion.kept_logp)] = completion.kept_logp
    return MicroBatch(batch._replace(truncated=truncated), found)


def _rows(batch: MicroBatch, values: np.ndarray) -> np.ndarray:
    """[groups, K] -> [rows, K] of a micro-batch; NaN in padding rows."""
    ids = batch.groups.group_id
    return np.where((ids >= 0)[:, None], values[np.maximum(ids, 0)], np.nan)


def _by_group(batches: Sequence[MicroBatch], rows: Sequence[np.ndarray], like: np.ndarray) -> np.ndarray:
    """The inverse of `_rows`."""
    found = np.array(like)
    for batch, values in zip(batches, rows, strict=True):
        real = batch.groups.group_id >= 0
        found[batch.groups.group_id[real]] = values[real]
    return found


def _with_advantage(batch: MicroBatch, advantages: np.ndarray) -> MicroBatch:
    own = np.nan_to_num(_rows(batch, advantages)).astype(np.float32)
    return batch._replace(groups=batch.groups._replace(advantage=own))


def _metrics(sampled: Sampled) -> dict[str, float | None]:
    rollouts = sampled.rollouts
    rewards = np.stack([r.rewards for r in rollouts])
    known = rewards[np.isfinite(rewards)]
    completions = [c for r in rollouts for c in r.completions]
    parts = {}
    for name in rollouts[0].parts:
        values = np.concatenate([r.parts[name] for r in rollouts])
        values = values[np.isfinite(values)]
        parts[name] = float(values.mean()) if values.size else None
    return {
        "reward": float(known.mean()) if known.size else None,
        "reward_std": float(known.std()) if known.size else None,
        "unscored": float(rewards.size - known.size),
        "reward_faults": float(sampled.faults),
        **parts,
        "length": float(np.mean([len(c.tokens) for c in completions])),
        "stopped": float(np.mean([c.stopped for c in completions])),
        "flat_groups": float(np.mean([r.flat for r in rollouts])),
        "attempts": float(sampled.attempts),
        "groups_drawn": float(sampled.drawn),
    }
