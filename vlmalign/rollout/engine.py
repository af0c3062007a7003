"""K completions per prompt in one compiled program: each prompt prefilled once, its completions decoded against it.

The prompt's keys and values are held once per prompt and shared by its K completions; each completion has a cache of
its own tokens only. Decoding runs in blocks of known length inside a loop that ends when every completion has stopped.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.models.attention import KeyValue, attend_segments, group_attention, resolve_attention
from vlmalign.models.model import Model, Params
from vlmalign.models.network import Network
from vlmalign.randomness import sample_keys
from vlmalign.rollout.sampling import Draw, Sampling, draw
from vlmalign.shapes import Array, Float, Int, Key
from vlmalign.types import GroupBatch

#: tokens decoded between two looks at whether anything is still running
BLOCK = 16


class Rollout(NamedTuple):
    """Sampled completions. Tokens after a completion's stop token are 0 and do not count in `length`."""

    tokens: Int[Array, "n k c"]
    length: Int[Array, "n k"]  #: real tokens, the stop token included
    stopped: Array  #: [n, k] bool: ended with a stop token rather than at the length limit
    logp: Float[Array, "n k c"]  #: log-probability over the whole vocabulary at the sampling temperature
    kept_logp: Float[Array, "n k c"]  #: the same within the tokens that top-p kept


class _State(NamedTuple):
    step: Int[Array, ""]
    logits: Float[Array, "m vocab"]
    stopped: Array
    length: Int[Array, "n k"]
    tokens: Int[Array, "n k c"]
    logp: Float[Array, "n k c"]
    kept_logp: Float[Array, "n k c"]
    cache: list[KeyValue]


def prefill(model: Model, network: Network, batch: GroupBatch) -> tuple[Float[Array, "n embed"], list[KeyValue]]:
    """The last real state of each prompt, and every layer's prompt keys and values [n, p, kv_heads, head_dim]."""
    if batch.features is None and batch.pixels is not None:
        raise ValueError("a rollout reads image features, found pixels; attach features first (FeatureStore.attach)")
    x = network.embed(batch.tokens, batch.image, batch.features)
    places, layout, cache = model.places(batch), batch.layout, []
    choice = resolve_attention(
        model.attention, layout=layout, head_dim=model.config.decoder.head_dim, dtype=jnp.dtype(model.dtype)
    )

    def attend(layer: int, q: Array, kv: KeyValue, window: int | None) -> Array:
        assert len(cache) == layer
        cache.append(kv)
        return group_attention(q, kv, places, layout, window, name=choice.name)

    hidden = network.language_model(x, batch.position, attend, remat="none")
    last = jnp.maximum(jnp.sum(batch.segment == 0, axis=1) - 1, 0)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], cache


def after_prompt(batch: GroupBatch) -> Int[Array, "n"]:
    """The rotary position of the token after each prompt: one past the largest coordinate, whatever the axis."""
    axes = tuple(range(2, batch.position.ndim))
    real = jnp.expand_dims(batch.segment == 0, axes)
    return jnp.max(jnp.where(real, batch.position, -1), axis=(1, *axes)) + 1


def output_logits(model: Model, network: Network, states: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """float32 logits, soft-capped where the family does so."""
    z = jnp.einsum("...d,vd->...v", states, network.head, preferred_element_type=jnp.float32)
    cap = model.config.decoder.logit_softcap
    return z if cap is None else cap * jnp.tanh(z / cap)


def _decode_step(
    model: Model,
    network: Network,
    tokens: Int[Array, "n k"],
    step: Int[Array, ""],
    prompt_length: Int[Array, "n"],
    next_position: Int[Array, "n"],
    shared: list[KeyValue],
    cache: list[KeyValue],
) -> tuple[Float[Array, "n k vocab"], list[KeyValue]]:
    """Logits after `tokens`, which stand at index `step` of every completion, and the grown cache."""
    n, k = tokens.shape
    config = model.config.decoder
    own_column = jnp.arange(cache[0].key.shape[2])
    far_column = jnp.arange(shared[0].key.shape[1])
    grown: list[KeyValue] = []

    def attend(layer: int, q: Array, kv: KeyValue, window: int | None) -> Array:
        key, value = (
            jax.lax.dynamic_update_slice_in_dim(old, new[:, :, None].astype(old.dtype), step, axis=2)
            for old, new in zip(cache[layer], kv, strict=True)
        )  # [n, k, c, kv_heads, head_dim]
        grown.append(KeyValue(key, value))
        near = own_column <= step
        far = far_column < prompt_length[:, None]  # [n, p]
        if window is not None:
            near &= step - own_column < window
            far &= prompt_length[:, None] + step - far_column < window
        out = attend_segments(
            q.reshape(n, k, 1, config.kv_heads, -1, config.head_dim),
            grown[layer],
            jnp.broadcast_to(near, (n, k, 1, len(own_column))),
            shared[layer],
            jnp.broadcast_to(far[:, None, None, :], (n, k, 1, len(far_column))),
        )
        return out.reshape(n, k, config.heads, config.head_dim)

    # Generated text: under M-RoPE its three coordinates are equal, which is what the decoder makes of one.
    position = jnp.broadcast_to((next_position + step)[:, None], (n, k))
    hidden = network.language_model(network.language_model.embed(tokens), position, attend, remat="none")
    return output_logits(model, network, hidden), grown


@partial(jax.jit, static_argnames=("model", "group", "completion", "stop_ids", "sampling"))
def generate(
    model: Model,
    params: Params,
    batch: GroupBatch,
    key: Key[Array, ""],
    *,
    group: int,
    completion: int,
    stop_ids: tuple[int, ...],
    sampling: Sampling,
    first_sample: int | Int[Array, ""] = 0,
) -> Rollout:
    """`group` completions of at most `completion` tokens for each prompt of a batch with layout (P; 0 x 0).

    The key of a draw is derived from (`key`, the row's `group_id`, sample id, position): it does not depend on the
    row, the batch size or how far the neighbours have come. Sample ids count from `first_sample`.
    """
    network = model.bind(params)
    n = batch.tokens.shape[0]
    with jax.named_scope("prefill"):
        last, shared = prefill(model, network, batch)
        first = output_logits(model, network, last)  # [n, vocab]
    prompt_length = jnp.sum(batch.segment == 0, axis=1)
    next_position = after_prompt(batch)
    keys = sample_keys(key, batch.group_id, first_sample + jnp.arange(group)).reshape(n * group)
    stops = jnp.asarray(stop_ids, jnp.int32)

    def one(state: _State) -> _State:
        picked: Draw = draw(state.logits, jax.vmap(jax.random.fold_in, (0, None))(keys, state.step), sampling)
        # Past the limit (the last block may overhang it) and after the stop token nothing is written.
        live = ~state.stopped & (state.step < completion)
        token, logp, kept = (jnp.where(live, x.reshape(n, group), 0) for x in picked)
        at = jnp.minimum(state.step, completion - 1)

        def put(rows: Array, value: Array) -> Array:
            old = jax.lax.dynamic_index_in_dim(rows, at, axis=2, keepdims=False)
            return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(live, value, old), at, axis=2)

        with jax.named_scope("decode"):
            logits, cache = _decode_step(model, network, token, at, prompt_length, next_position, shared, state.cache)
        return _State(
            step=state.step + 1,
            logits=logits.reshape(n * group, -1),
            stopped=state.stopped | (live & jnp.isin(token, stops)),
            length=state.length + live,
            tokens=put(state.tokens, token),
            logp=put(state.logp, logp),
            kept_logp=put(state.kept_logp, kept),
            cache=cache,
        )

    def block(state: _State) -> _State:
        return jax.lax.fori_loop(0, BLOCK, lambda _, s: one(s), state)

    shape = (n, group, completion)
    config = model.config.decoder
    cache_shape = (*shape, config.kv_heads, config.head_dim)
    start = _State(
        step=jnp.zeros((), jnp.int32),
        logits=jnp.repeat(first, group, axis=0),
        # Padding rows have no prompt: they count as stopped from the start.
        stopped=jnp.broadcast_to((prompt_length == 0)[:, None], (n, group)),
        length=jnp.zeros((n, group), jnp.int32),
        tokens=jnp.zeros(shape, jnp.int32),
        logp=jnp.zeros(shape),
        kept_logp=jnp.zeros(shape),
        cache=[KeyValue(*(jnp.zeros(cache_shape, x.dtype) for x in kv)) for kv in shared],
    )
    end = jax.lax.while_loop(lambda s: (s.step < completion) & ~jnp.all(s.stopped), block, start)
    return Rollout(end.tokens, end.length, end.stopped, end.logp, end.kept_logp)
