"""One optimiser step: gradients of micro-batches added up, each loss part divided once by counts of the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vlmalign.mesh import Placement, on_mesh, put_batch, put_rows, replicated, require_placed, reshard
from vlmalign.models.linear import is_projection
from vlmalign.models.model import Model, Params
from vlmalign.objectives.logprobs import token_logprobs
from vlmalign.randomness import key_for
from vlmalign.shapes import Array, Float, Int, Key
from vlmalign.training.value_head import split_value_head, token_values
from vlmalign.types import GroupBatch, LossParts, Scores


@dataclass(frozen=True)
class Objective:
    """A pure loss of `Scores`, and the counts that divide its parts, taken on the host over the whole batch."""

    name: str
    loss: Callable[[Scores, GroupBatch], LossParts]
    counts: Callable[..., dict[str, float]]  #: (batches, **the step's options)
    temperature: float = 1.0  #: of the distribution whose log-probabilities are taken
    needs_reference: bool = False
    needs_values: bool = False  #: the trained parameters hold a value head
    needs_collision: bool = False  #: `Scores.collision` is asked for
    dropout: bool = False  #: drop inputs of the adapter at its rate; for supervised losses (see `Model.hidden`)


class MicroBatch(NamedTuple):
    """Groups, and what was recorded about their tokens before this step ([N, K, C] arrays by `Scores` field)."""

    groups: GroupBatch
    recorded: Mapping[str, Float[Array, "n k c"]]


class TrainState(NamedTuple):
    """All that an update changes."""

    params: dict[str, Array]  #: the trained parameters, float32 whatever the dtype they are used in
    opt_state: optax.OptState
    step: Int[Array, ""]  #: optimiser batches seen, those skipped included


class StepMetrics(NamedTuple):
    """Sums and counts of the objective's metrics over the batch, and the gradient norm before clipping."""

    parts: dict[str, tuple[Array, Array]]
    maxima: dict[str, Array]
    loss: Float[Array, ""]
    grad_norm: Float[Array, ""]
    skipped: Array  #: [] bool: loss or gradient was not finite and nothing was updated


class _Found(NamedTuple):
    """Of an objective's micro-batches together, as in `StepMetrics`."""

    loss: Float[Array, ""]
    parts: dict[str, tuple[Array, Array]]
    maxima: dict[str, Array]


def token_scores(
    model: Model,
    params: Params,
    batch: GroupBatch,
    temperature: float,
    dropout: Key[Array, ""] | None = None,
    *,
    collision: bool = False,
) -> Scores:
    """Log-probability and entropy of every continuation token, [N, K, C]; values where `params` hold a value head."""
    prompt, group, completion = batch.layout
    tokens = batch.tokens[:, prompt:].reshape(-1, group, completion)
    params, head = split_value_head(params)
    states = model.states(params, batch, dropout)
    scores = token_logprobs(
        states,
        model.head(params),
        tokens,
        temperature=temperature,
        softcap=model.config.decoder.logit_softcap,
        collision=collision,
    )
    values = token_values(states, head) if head else None
    return Scores(logp=scores.logp, entropy=scores.entropy, collision=scores.collision, values=values)


class Trainer:
    """Compiled functions of one model, objective and optimiser. Frozen parameters are arguments, never constants.

    Trained parameters and their moments are float32; where the model runs in bfloat16 they are cast as they are used.
    `reference` is (model, parameters it adds to the frozen ones): the base alone when the adapter starts from zero,
    or a frozen copy of an earlier adapter. `seed` is what dropout masks are drawn from. `beside` is the trainer of a second
    objective of the same model, whose gradient a step may add.

    With a `placement` the same programs run on its mesh: batches are cut by rows, the trained parameters, their
    gradients and their moments live where it says, and so must the frozen ones.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        optimiser: optax.GradientTransformation,
        *,
        reference: tuple[Model, Params] | None = None,
        seed: int = 0,
        placement: Placement | None = None,
        beside: Trainer | None = None,
    ):
        if objective.needs_reference and reference is None:
            raise ValueError(f"objective {objective.name} compares with a reference policy; none was given")
        self.model, self.objective, self.optimiser = model, objective, optimiser
        self.reference, self.seed, self.beside = reference, seed, beside
        self.placement, self.mesh = placement, None if placement is None else placement.mesh
        if reference is not None and placement is not None:
            self.reference = (reference[0], reshard(reference[1], placement))
        self._accumulate = on_mesh(jax.jit(self._micro, donate_argnames=("sums",)), self.mesh)
        self._apply = on_mesh(jax.jit(self._update, donate_argnames=("state",)), self.mesh)
        self._reference_logp = on_mesh(jax.jit(self._reference_scores), self.mesh)
        self._score = on_mesh(jax.jit(self._scores), self.mesh)
        self._measure = on_mesh(jax.jit(self._plain_loss), self.mesh)

    def init(self, params: Params) -> TrainState:
        """The state before the first update."""
        params = {name: value.astype(jnp.float32) for name, value in params.items()}
        if self.placement is None:
            return TrainState(params, self.optimiser.init(params), jnp.zeros((), jnp.int32))
        params = reshard(params, self.placement)
        where = self._shardings(params)
        # Compiled, so that moments are never whole on any device, not even before they are cut.
        opt_state = jax.jit(self.optimiser.init, out_shardings=where.opt_state)(params)
        return TrainState(params, opt_state, jax.device_put(jnp.zeros((), jnp.int32), where.step))

    def step(
        self,
        state: TrainState,
        frozen: Params,
        batches: Sequence[MicroBatch],
        options: Mapping[str, Any] = {},
        beside: Sequence[MicroBatch] = (),
    ) -> tuple[TrainState, StepMetrics]:
        """One update from all micro-batches. `state` is donated. A loss or gradient that is not
        finite changes nothing. `options` go to the objective's counts.

        `beside` are micro-batches of the second objective. Each objective is divided by counts of its own, and the update is
        that of the sum of their gradients."""
        grads = jax.tree.map(jnp.zeros_like, state.params)
        grads, (loss, parts, maxima) = self._gradients(grads, state, frozen, batches, options)
        if beside:
            assert self.beside is not None, "micro-batches of a second objective need its trainer"
            grads, more = self.beside._gradients(grads, state, frozen, beside, {})
            loss, parts, maxima = loss + more.loss, parts | more.parts, maxima | more.maxima
        state, norm, skipped = self._apply(state, grads, loss)
        return state, StepMetrics(parts, maxima, loss, norm, skipped)

    def _gradients(
        self,
        grads: dict[str, Array],
        state: TrainState,
        frozen: Params,
        batches: Sequence[MicroBatch],
        options: Mapping[str, Any],
    ) -> tuple[dict[str, Array], _Found]:
        """`grads`, which are donated, with those of these micro-batches added, and what was measured."""
        counts = self.objective.counts([b.groups for b in batches], **options)
        empty = [part for part, count in counts.items() if not count > 0]
        if empty:
            raise ValueError(
                f"nothing to learn from in this optimiser batch: the count of {', '.join(empty)} is 0; "
                "check that examples have loss tokens"
            )
        losses, parts, maxima = [], [], []
        for batch in self._placed(batches, frozen):
            known = self._with_reference(batch, frozen)
            grads, (loss, metrics, largest) = self._accumulate(
                grads, state.params, frozen, batch.groups, known, counts, state.step
            )
            losses.append(loss)
            parts.append(metrics)
            maxima.append(largest)
        return grads, _Found(sum(losses), _summed(parts), _largest(maxima))

    def evaluate(self, params: Params, frozen: Params, batches: Sequence[MicroBatch]) -> dict[str, tuple[Array, Array]]:
        """The objective's metrics as (sum, count) over these batches, without dropout and without an update."""
        parts = []
        for batch in self._placed(batches, frozen):
            parts.append(self._measure(params, frozen, batch.groups, self._with_reference(batch, frozen)))
        return _summed(parts)

    def scores(self, params: Params, frozen: Params, groups: GroupBatch) -> Scores:
        """Scores of every continuation token under these parameters, without dropout."""
        return self._score(params, frozen, put_batch(groups, self.mesh))

    def reference_logp(self, frozen: Params, groups: GroupBatch) -> Float[Array, "n k c"]:
        """Log-probability of every continuation token under the reference."""
        assert self.reference is not None
        return self._reference_logp(frozen, self.reference[1], put_batch(groups, self.mesh))

    def _placed(self, batches: Sequence[MicroBatch], frozen: Params) -> Iterator[MicroBatch]:
        """The batches one by one, cut by rows where there is a mesh."""
        if self.placement is not None:
            require_placed(frozen, self.placement)
        for groups, recorded in batches:
            yield MicroBatch(put_batch(groups, self.mesh), put_rows(dict(recorded), self.mesh))

    def _shardings(self, params: Params) -> TrainState:
        """Where the state of these parameters lives: moments with the parameters they are of."""
        own, whole = {name: self.placement(name) for name in params}, replicated(self.mesh)
        opt_state = optax.tree.map_params(
            self.optimiser,
            lambda _, sharding: sharding,
            jax.eval_shape(self.optimiser.init, params),
            own,
            transform_non_params=lambda _: whole,
        )
        return TrainState(own, opt_state, whole)

    def _with_reference(self, batch: MicroBatch, frozen: Params) -> dict[str, Any]:
        known = dict(batch.recorded)
        if self.objective.needs_reference and "ref_logp" not in known:
            known["ref_logp"] = self.reference_logp(frozen, batch.groups)
        return known

    def _together(self, params: Params, frozen: Params) -> dict[str, Array]:
        # Matrices are rounded where they are multiplied, so that devices add up float32 gradients of them.
        shapes = self.model.shapes
        used = {k: v.astype(shapes[k].dtype) if k in shapes and not is_projection(k) else v for k, v in params.items()}
        return {**frozen, **used}

    def _micro(
        self,
        sums: dict[str, Array],
        params: Params,
        frozen: Params,
        groups: GroupBatch,
        recorded: Mapping[str, Array],
        counts: Mapping[str, Float[Array, ""]],
        step: Int[Array, ""],
    ) -> tuple[dict[str, Array], tuple[Array, dict, dict]]:
        dropout = key_for(self.seed, step, "dropout") if self.objective.dropout else None

        def loss(params: Params) -> tuple[Array, tuple[dict, dict]]:
            scores = self._scores(params, frozen, groups, dropout)
            found = self.objective.loss(scores._replace(**recorded), groups)
            total = sum(value / counts[part] for part, value in found.sums.items())
            return total, (found.metrics, found.maxima)

        (value, (metrics, maxima)), grads = jax.value_and_grad(loss, has_aux=True)(dict(params))
        sums = jax.tree.map(jnp.add, sums, grads)
        if self.placement is not None:
            # Cut like the parameters as soon as they are summed: otherwise every device would hold all of them.
            sums = jax.lax.with_sharding_constraint(sums, {name: self.placement(name) for name in sums})
        return sums, (value, metrics, maxima)

    def _update(self, state: TrainState, grads: dict[str, Array], loss: Array) -> tuple[TrainState, Array, Array]:
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(loss)
        updates, opt_state = self.optimiser.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (params, opt_state), (state.params, state.opt_state)
        )
        state = TrainState(params, opt_state, state.step + 1)
        if self.placement is not None:
            state = jax.lax.with_sharding_constraint(state, self._shardings(params))
        return state, norm, ~finite

    def _scores(
        self, params: Params, frozen: Params, groups: GroupBatch, dropout: Key[Array, ""] | None = None
    ) -> Scores:
        return token_scores(
            self.model,
            self._together(params, frozen),
            groups,
            self.objective.temperature,
            dropout,
            collision=self.objective.needs_collision,
        )

    def _plain_loss(
        self, params: Params, frozen: Params, groups: GroupBatch, recorded: Mapping[str, Array]
    ) -> dict[str, tuple[Array, Array]]:
        return self.objective.loss(self._scores(params, frozen, groups)._replace(**recorded), groups).metrics

    def _reference_scores(self, frozen: Params, extra: Params, groups: GroupBatch) -> Float[Array, "n k c"]:
        model = self.reference[0]
        return token_scores(model, {**frozen, **extra}, groups, self.objective.temperature).logp


def _largest(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    return {name: jnp.max(jnp.stack([p[name] for p in parts])) for name in parts[0]}


def _summed(parts: Sequence[Mapping[str, tuple[Array, Array]]]) -> dict[str, tuple[Array, Array]]:
    return {name: tuple(sum(p[name][i] for p in parts) for i in (0, 1)) for name in parts[0]}
