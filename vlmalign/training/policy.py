"""Optimiser batches for GRPO and PPO: roll out the current policy, score the answers, give every token its advantage.

One rollout serves `updates` optimiser steps. With more than one, log-probabilities of the policy that sampled are
recorded once, before the first, and a checkpoint may only be made between rollouts.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from vlmalign.data.films.prefetch import Announced
from vlmalign.distributed import process_count
from vlmalign.exchange import fetch
from vlmalign.log import EMPTY
from vlmalign.models.model import Params
from vlmalign.objectives.advantages import (
    Advantages,
    combined_advantages,
    group_advantages,
    leave_one_out_advantages,
)
from vlmalign.objectives.entropy import (
    EntropyState,
    applied_coefficient,
    init_entropy,
    top_entropy_masks,
    update_entropy,
)
from vlmalign.objectives.gae import estimate_advantages, token_rewards, whiten
from vlmalign.objectives.kl import kl_per_token, rewards_less_kl
from vlmalign.objectives.names import require_known
from vlmalign.randomness import key_for
from vlmalign.rollout.completions import Completion, Generator
from vlmalign.rollout.merge_check import LogpGap, judge_gap, logp_gap
from vlmalign.rollout.statistics import RolloutStats
from vlmalign.shapes import Array
from vlmalign.training.completion_log import CompletionLog
from vlmalign.training.loop import Work
from vlmalign.training.merged import merge_program
from vlmalign.training.rollout_batches import by_group, by_row, record, rollout_batches, with_advantage
from vlmalign.training.rollout_metrics import reward_table, rollout_metrics
from vlmalign.training.rollout_settings import RolloutSettings
from vlmalign.training.rollouts import OVERLONG, Prompts, Rollout, Sampler, Score, Task
from vlmalign.training.step import MicroBatch, Trainer
from vlmalign.training.supervised import Shapes
from vlmalign.types import Group, Scores

log = logging.getLogger(__name__)


@runtime_checkable
class Memory(Protocol):
    """What rewards remember from round to round; part of every checkpoint."""

    def get_state(self) -> dict[str, Any]:
        """JSON. Called when a checkpoint is made: what rewards keep on disk must be there when this returns."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to where `get_state` said."""
        ...


@runtime_checkable
class Control(Protocol):
    """Weights of rewards that move while training."""

    def multipliers(self) -> Mapping[str, float]:
        """Reward -> the factor of its weight in this rollout; 1 for those that are not there."""
        ...

    def numbers(self) -> Mapping[str, float | None]:
        """For the metrics of this rollout."""
        ...


class PolicySource:
    """Rolls out the trained policy, merged once per rollout, and turns rewards into advantages over whole groups."""

    waits = True

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
        memory: Memory | None = None,
        control: Control | None = None,
        log: CompletionLog | None = None,
        bring: Callable[[dict[str, Array]], dict[str, Array]] = lambda merged: merged,
    ):
        """`base` are the frozen parameters (none where the whole model is trained); `memory` is that of `score`, and
        `control` moves its weights.

        `bring` moves the merged parameters from the trainer's mesh to where the generator reads them, once per rollout.

        Raises:
            ValueError: when generator, trainer and settings do not fit each other.
        """
        _check(generator, trainer, settings)
        # Which of several processes answers a prompt is known when it is drawn; the generator announces its share.
        if generator.features is not None and process_count() == 1:
            tasks = Announced(tasks, films=lambda task: task.prompt.images, expect=generator.features.expect)
        self._prompts = Prompts(tasks, most=settings.prompts, seed=settings.seed)
        self._generator, self._trainer, self._base = generator, trainer, base
        self._shapes, self._settings = shapes, settings
        self._memory, self._control, self._log = memory, control, log
        self._merge, self._bring = merge_program(trainer.model, trainer.mesh, generator.mesh), bring
        self._warm = not generator.prompt_lengths  #: without known lengths, programs compile as they are met
        self._warned = False
        self._stats = RolloutStats()
        self._gap: LogpGap | None = None
        self._policy: dict[str, Array] = {}  #: what is being rolled out, while it is
        self._sampler = Sampler(
            generate=self._generate,
            decode=decode,
            score=score,
            flat=lambda rollouts: self._advantages(reward_table(rollouts), rollouts).flat,
            wanted=settings.prompts,
            attempts=settings.attempts,
            longest=generator.completion,
            overlong_buffer=settings.overlong_buffer,
        )
        self._held: list[MicroBatch] = []
        self._ids: list[int] = []  #: of the prompts that are held
        self._used = 0  #: updates made of what is held
        adaptive = settings.adaptive_entropy
        self._entropy: EntropyState | None = None if adaptive is None else init_entropy(adaptive)

    def work(self, step: int, params: Params) -> Work:
        if step % self._settings.updates:
            assert self._held, "a stage begins and continues between rollouts"
            self._used += 1
            return Work(self._held, {"update": self._used}, self._options(), self._ids)
        if step == 0 and self._log is not None:
            self._log.rewind(EMPTY)
        self._policy = self._bring(self._merge(self._base, params))
        if not self._warm:
            self._generator.warm_up(self._policy)
            self._warm = True
        self._stats, self._gap = RolloutStats(), None
        sampled = self._sampler.draw(step, self._prompts)
        self._policy = {}  # a copy of the whole model: its memory is needed for training
        self._held, advantages = self._batch(sampled.rollouts, params)
        self._used = 1
        if self._log is not None:
            self._log.write(step + 1, sampled.rollouts, advantages)
        self._ids = [rollout.task.prompt.id for rollout in sampled.rollouts]
        metrics = {"update": 1, **rollout_metrics(sampled, self._stats, self._gap)}
        if self._control is not None:
            metrics |= self._control.numbers()
        return Work(self._held, metrics, self._options(), self._ids)

    def observe(self, line: Mapping[str, Any]) -> None:
        # At the first update nothing has been learnt since: what differs is the merged copy and its programs.
        if line.get("update") == 1 and line.get("rollout_gap") is not None:
            warning = judge_gap(line["rollout_gap"], self._trainer.model.dtype)
            if warning is not None and not self._warned:
                log.warning("step %s: %s", line["step"], warning)
                self._warned = True
        adaptive = self._settings.adaptive_entropy
        if adaptive is not None and line.get("entropy") is not None:
            self._entropy = update_entropy(line["entropy"], self._entropy, adaptive)

    def _options(self) -> dict[str, float]:
        """What the objective's counts need of this step: the coefficient of an entropy bonus that adapts."""
        adaptive = self._settings.adaptive_entropy
        return {} if adaptive is None else {"entropy_coef": applied_coefficient(self._entropy, adaptive)}

    def get_state(self) -> dict[str, Any]:
        if self._used % self._settings.updates:
            raise ValueError(
                f"a checkpoint between the {self._settings.updates} updates of one rollout cannot be continued; "
                "make steps, checkpoint_every and evaluate_every multiples of updates"
            )
        return {
            "prompts": self._prompts.get_state(),
            "completions": None if self._log is None else self._log.position(),
            "memory": None if self._memory is None else self._memory.get_state(),
            "entropy": None if self._entropy is None else _saved(self._entropy),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        self._prompts.set_state(state["prompts"])
        self._held, self._used = [], 0
        if state["entropy"] is not None:
            self._entropy = _restored(state["entropy"])
        if self._log is not None:
            self._log.rewind(state["completions"] or EMPTY)
        if self._memory is not None:
            self._memory.set_state(state["memory"])

    def _generate(self, prompts: Sequence[Group], number: int) -> list[list[Completion]]:
        # By round, not by step: a prompt that is drawn again must not be answered again with the same draws.
        key = key_for(self._settings.seed, number, "rollout")
        return self._generator.run(self._policy, prompts, key, report=self._count)

    def _count(self, stats: RolloutStats) -> None:
        self._stats += stats

    def _batch(self, rollouts: list[Rollout], params: Params) -> tuple[list[MicroBatch], np.ndarray]:
        """Micro-batches with everything recorded, and the advantages [groups, K] for the log."""
        settings = self._settings
        rewards = reward_table(rollouts)
        batches = rollout_batches(rollouts, self._shapes, self._generator.features)
        scores: list[Scores] = []
        kl: list[np.ndarray] | None = None
        if settings.scores_first:
            scores = [fetch(self._trainer.scores(params, self._base, b.groups)) for b in batches]
            self._gap = logp_gap(
                [b.recorded["rollout_logp"] for b in batches],
                [s.logp for s in scores],
                [b.groups.weight > 0 for b in batches],
            )
            batches = [record(b, old_logp=s.logp) for b, s in zip(batches, scores, strict=True)]
            if settings.top_entropy < 1:
                batches = self._with_entropy_masks(batches, scores)
            # Once per rollout, since the reference does not change from update to update.
            if settings.kl_in_reward > 0 or self._trainer.objective.needs_reference:
                ref = [fetch(self._trainer.reference_logp(self._base, b.groups)) for b in batches]
                batches = [record(b, ref_logp=r) for b, r in zip(batches, ref, strict=True)]
            if settings.kl_in_reward > 0:
                known = [(b.recorded["old_logp"], b.recorded["ref_logp"], b.groups.weight) for b in batches]
                kl = [kl_per_token(*each, kind=settings.kl) for each in known]
        if settings.advantage == "token":
            return self._with_token_advantages(batches, scores, rewards, kl)
        if kl is not None:
            rows = [
                rewards_less_kl(by_row(b, rewards), k, beta=settings.kl_in_reward)
                for b, k in zip(batches, kl, strict=True)
            ]
            rewards = by_group(batches, rows, len(rollouts))
        advantages = self._advantages(rewards, rollouts).value
        return [with_advantage(b, advantages) for b in batches], advantages

    def _advantages(self, rewards: np.ndarray, rollouts: Sequence[Rollout]) -> Advantages:
        settings = self._settings
        if rewards.shape[1] < 2:  # PPO, whose critic compares
            return Advantages(np.zeros(rewards.shape, np.float32), np.zeros(len(rewards), bool))
        if settings.advantage == "leave_one_out":
            return leave_one_out_advantages(rewards)
        if settings.normalise_first is None:
            return group_advantages(rewards, scale=settings.scale, ddof=settings.ddof)
        moved = {} if self._control is None else self._control.multipliers()
        weights = {name: weight * moved.get(name, 1.0) for name, weight in settings.normalise_first.items()}
        for name in weights:
            require_known("reward in normalise_first", name, tuple(rollouts[0].parts))
        if OVERLONG in rollouts[0].parts and OVERLONG not in weights:
            raise ValueError(f"overlong_buffer is set: give the penalty a weight in normalise_first ({OVERLONG}: 1.0)")
        parts = np.stack([np.stack([r.parts[name] for r in rollouts]) for name in weights], axis=-1)
        # A completion one of whose rewards failed is not scored by the others.
        parts = np.where(np.isfinite(rewards)[..., None], parts, np.nan)  # [groups, K, rewards]
        return combined_advantages(
            parts, np.array(list(weights.values())), aggregation="normalise_then_sum", ddof=settings.ddof
        )

    def _with_entropy_masks(self, batches: list[MicroBatch], scores: list[Scores]) -> list[MicroBatch]:
        masks = []
        for batch in batches:
            left_out = (
                batch.groups.truncated if self._settings.mask_truncated else np.zeros_like(batch.groups.truncated)
            )
            masks.append((batch.groups.weight > 0) & ~left_out[..., None])
        chosen = top_entropy_masks([s.entropy for s in scores], masks, share=self._settings.top_entropy)
        return [b._replace(groups=b.groups._replace(entropy_mask=m)) for b, m in zip(batches, chosen, strict=True)]

    def _with_token_advantages(
        self, batches: list[MicroBatch], scores: list[Scores], rewards: np.ndarray, kl: list[np.ndarray] | None
    ) -> tuple[list[MicroBatch], np.ndarray]:
        settings = self._settings
        if not np.isfinite(rewards).any():
            raise ValueError("no completion of this optimiser batch could be scored; look at the rewards' faults")
        found, advantages = [], []
        for i, (batch, score) in enumerate(zip(batches, scores, strict=True)):
            own = by_row(batch, rewards)
            # A completion that could not be scored teaches nothing.
            weight = np.where(np.isfinite(own)[..., None], batch.groups.weight, 0.0).astype(np.float32)
            penalty = None if kl is None else kl[i]
            per_token = token_rewards(own, weight, kl=penalty, beta=settings.kl_in_reward)
            estimated = estimate_advantages(per_token, score.values, weight, gamma=settings.gamma, lam=settings.lam)
            batch = record(batch, old_values=score.values, returns=estimated.returns)
            found.append(batch._replace(groups=batch.groups._replace(weight=weight)))
            advantages.append(estimated.advantage)
        whitened = whiten(advantages, [b.groups.weight for b in found])
        means = [a.sum(-1) / np.maximum((b.groups.weight > 0).sum(-1), 1) for b, a in zip(found, whitened, strict=True)]
        done = [record(b, advantage=a) for b, a in zip(found, whitened, strict=True)]
        return done, by_group(done, means, len(rewards))


def _check(generator: Generator, trainer: Trainer, settings: RolloutSettings) -> None:
    objective, per_token = trainer.objective, settings.advantage == "token"
    if generator.group < 2 and not per_token:
        raise ValueError(
            f"a group needs at least 2 completions to compare, found {generator.group}; raise rollout.group"
        )
    if settings.kl_in_reward > 0 and trainer.reference is None:
        raise ValueError("kl_in_reward compares with a reference policy; none was given")
    if per_token != objective.needs_values:
        raise ValueError(
            f"token advantages go with an objective that trains a value head, and only with it; found advantage "
            f"{settings.advantage!r} and objective {objective.name}"
        )
    if generator.sampling.temperature != objective.temperature:
        raise ValueError(
            f"completions are sampled at temperature {generator.sampling.temperature}, but the objective takes "
            f"log-probabilities at {objective.temperature}; make them equal (and > 0)"
        )


def _saved(state: EntropyState) -> dict[str, float | None]:
    """JSON has no infinity, which is what the last entropy is before the first step."""
    last = state.last_entropy
    return {"coefficient": state.coefficient, "last_entropy": last if math.isfinite(last) else None}


def _restored(saved: Mapping[str, float | None]) -> EntropyState:
    last = saved["last_entropy"]
    return EntropyState(float(saved["coefficient"] or 0.0), math.inf if last is None else last)
