"""One optimiser step: gradients of micro-batches added up, each loss part divided once by counts of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlmalign.models.model import Model, Params
from vlmalign.objectives.logprobs import token_logprobs
from vlmalign.shapes import Array, Float, Int
from vlmalign.types import GroupBatch, LossParts, Scores


@dataclass(frozen=True)
class Objective:
    """A pure loss of `Scores`, and the counts that divide its parts, taken on the host over the whole batch."""

    name: str
    loss: Callable[[Scores, GroupBatch], LossParts]
    counts: Callable[[Sequence[GroupBatch]], dict[str, float]]
    temperature: float = 1.0  #: of the distribution whose log-probabilities are taken
    needs_reference: bool = False


class MicroBatch(NamedTuple):
    """Groups, and what was recorded about their tokens before this step ([N, K, C] arrays by `Scores` field)."""

    groups: GroupBatch
    recorded: Mapping[str, Float[Array, "n k c"]]


class TrainState(NamedTuple):
    """All that an update changes."""

    params: dict[str, Array]  #: the trained parameters
    opt_state: optax.OptState
    step: Int[Array, ""]  #: updates done


class StepMetrics(NamedTuple):
    """Sums and counts of the objective's metrics over the batch, and the gradient norm before clipping."""

    parts: dict[str, tuple[Array, Array]]
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]


def token_scores(model: Model, params: Params, batch: GroupBatch, temperature: float) -> Scores:
    """Log-probability and entropy of every continuation token, [N, K, C]."""
    prompt, group, completion = batch.layout
    tokens = batch.tokens[:, prompt:].reshape(-1, group, completion)
    scores = token_logprobs(
        model.states(params, batch),
        model.head(params),
        tokens,
        temperature=temperature,
        softcap=model.config.decoder.logit_softcap,
    )
    return Scores(logp=scores.logp, entropy=scores.entropy)


class Trainer:
    """Compiled functions of one model, objective and optimiser. Frozen parameters are arguments, never constants.

    `reference` is (model, parameters it adds to the frozen ones): the base alone when the adapter starts from zero,
    or a frozen copy of an earlier adapter.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        optimiser: optax.GradientTransformation,
        *,
        reference: tuple[Model, Params] | None = None,
    ):
        if objective.needs_reference and reference is None:
            raise ValueError(f"objective {objective.name} compares with a reference policy; none was given")
        self.model, self.objective, self.optimiser, self.reference = model, objective, optimiser, reference
        self._accumulate = jax.jit(self._micro, donate_argnames=("sums",))
        self._apply = jax.jit(self._update, donate_argnames=("state",))
        self._reference_logp = jax.jit(self._reference_scores)

    def init(self, params: Params) -> TrainState:
        """The state before the first update."""
        params = dict(params)
        return TrainState(params, self.optimiser.init(params), jnp.zeros((), jnp.int32))

    def step(self, state: TrainState, frozen: Params, batches: Sequence[MicroBatch]) -> tuple[TrainState, StepMetrics]:
        """One update from all micro-batches. `state` is donated."""
        counts = self.objective.counts([b.groups for b in batches])
        empty = [part for part, count in counts.items() if not count > 0]
        if empty:
            raise ValueError(
                f"nothing to learn from in this optimiser batch: the count of {', '.join(empty)} is 0; "
                "check that examples have loss tokens"
            )
        grads = jax.tree.map(jnp.zeros_like, state.params)
        losses, parts = [], []
        for groups, recorded in batches:
            known = dict(recorded)
            if self.objective.needs_reference:
                assert self.reference is not None
                known["ref_logp"] = self._reference_logp(frozen, self.reference[1], groups)
            grads, (loss, metrics) = self._accumulate(grads, state.params, frozen, groups, known, counts)
            losses.append(loss)
            parts.append(metrics)
        state, norm = self._apply(state, grads)
        summed = {name: tuple(sum(p[name][i] for p in parts) for i in (0, 1)) for name in parts[0]}
        return state, StepMetrics(summed, sum(losses), norm)

    def _micro(
        self,
        sums: dict[str, Array],
        params: Params,
        frozen: Params,
        groups: GroupBatch,
        recorded: Mapping[str, Array],
        counts: Mapping[str, Float[Array, ""]],
    ) -> tuple[dict[str, Array], tuple[Array, dict]]:
        def loss(params: Params) -> tuple[Array, dict]:
            scores = token_scores(self.model, {**frozen, **params}, groups, self.objective.temperature)
            found = self.objective.loss(scores._replace(**recorded), groups)
            total = sum(value / counts[part] for part, value in found.sums.items())
            return total, found.metrics

        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(dict(params))
        return jax.tree.map(jnp.add, sums, grads), (value, metrics)

    def _update(self, state: TrainState, grads: dict[str, Array]) -> tuple[TrainState, Array]:
        updates, opt_state = self.optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, opt_state, state.step + 1), optax.tree.norm(grads)

    def _reference_scores(self, frozen: Params, extra: Params, groups: GroupBatch) -> Float[Array, "n k c"]:
        model = self.reference[0]
        return token_scores(model, {**frozen, **extra}, groups, self.objective.temperature).logp
