"""What runs on the device during a rollout: prompts computed once, their completions decoded in blocks against them.

A prompt's keys and values are held once and shared by its K completions; each completion has a cache of its own tokens
only, as long as the longest of them has become. A block is a known number of tokens, so that the device never waits
for the host within it; caches are per layer, layers are unrolled, and the caches that grow are donated.

`generate` puts all of this into one program; `completions.Generator` runs the same steps as programs of a few shapes
that follow the completions as they grow and end.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.models.attention import KeyValue, attend_decode, attend_from, group_attention, resolve_attention
from vlmalign.models.decoder import Tables
from vlmalign.models.model import Model, Params
from vlmalign.models.network import Network
from vlmalign.models.product import product_of_few
from vlmalign.rollout.decode_weights import bind_for_decoding
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
    kept_logp: Float[Array, "n k c"]  #: the same within the tokens that top-k, top-p and min-p kept


class Prefilled(NamedTuple):
    """What decoding reads of prompts."""

    last: Float[Array, "n embed"]  #: the state after each prompt's last token
    shared: list[KeyValue]  #: per layer; keys [n, kv_heads, head_dim, p], values [n, kv_heads, p, head_dim]


class Rows(NamedTuple):
    """Which prompt and which samples of it stand in each row, and how far they have come."""

    prompt_length: Int[Array, "n"]
    next_position: Int[Array, "n"]
    group_id: Int[Array, "n"]
    sample: Int[Array, "n k"]  #: sample ids, from which keys are derived
    step: Int[Array, "n"]  #: tokens that the row's completions have


class Cache(NamedTuple):
    """What grows with every token."""

    states: Float[Array, "n k embed"]  #: after the last token of each completion
    own: list[KeyValue]  #: per layer [n, k, kv_heads, tokens, head_dim]


def block_length(completion: int) -> int:
    """Tokens per block, such that blocks cover `completion` tokens with the least overhang.

    >>> block_length(64), block_length(21), block_length(5)
    (16, 11, 5)
    """
    count = -(-completion // BLOCK)
    return -(-completion // count)


def prefill(model: Model, params: Params, batch: GroupBatch) -> Prefilled:
    """Every layer's prompt keys and values, and the last real state of each prompt: no logits of prompt tokens, and in
    the last layer no other states."""
    if batch.features is None and batch.pixels is not None:
        raise ValueError("a rollout reads image features, found pixels; attach features first (FeatureStore.attach)")
    network = bind_for_decoding(model, params)
    x = network.embed(batch.tokens, batch.image, batch.features)
    places, layout, shared = model.places(batch), batch.layout, []
    choice = resolve_attention(
        model.attention, layout=layout, head_dim=model.config.decoder.head_dim, dtype=jnp.dtype(model.dtype)
    )

    end = jnp.maximum(jnp.sum(batch.segment == 0, axis=1) - 1, 0)

    def keep(kv: KeyValue) -> None:
        # Laid out as decoding multiplies them, so that they are turned once and not at every step.
        shared.append(KeyValue(jnp.moveaxis(kv.key, 1, 3), jnp.moveaxis(kv.value, 1, 2)))

    def attend(q: Array, kv: KeyValue, window: int | None) -> Array:
        keep(kv)
        return group_attention(q, kv, places, layout, window, name=choice.name)

    def attend_last(q: Array, kv: KeyValue, window: int | None) -> Array:
        keep(kv)
        return attend_from(q, kv, places, end, window)

    with jax.named_scope("prefill"):
        tables = network.language_model.tables(batch.position)
        attends = [*[attend] * (len(tables) - 1), attend_last]
        last = network.language_model.with_caches(x, tables, attends, end)
    return Prefilled(last[:, 0], shared)


def after_prompt(batch: GroupBatch) -> Int[Array, "n"]:
    """The rotary position of the token after each prompt: one past the largest coordinate, whatever the axis."""
    axes = tuple(range(2, batch.position.ndim))
    real = jnp.expand_dims(batch.segment == 0, axes)
    return jnp.max(jnp.where(real, batch.position, -1), axis=(1, *axes)) + 1


def output_logits(model: Model, network: Network, states: Float[Array, "*batch embed"]) -> Float[Array, "*batch vocab"]:
    """float32 logits, soft-capped where the family does so."""
    z = product_of_few(states, network.head, jnp.dtype("float32"))
    cap = model.config.decoder.logit_softcap
    return z if cap is None else cap * jnp.tanh(z / cap)


def empty_cache(model: Model, *, rows: int, group: int, length: int) -> Cache:
    """No tokens yet; room for `length` of each completion."""
    config, dtype = model.config.decoder, jnp.dtype(model.dtype)
    shape = (rows, group, config.kv_heads, length, config.head_dim)
    own = [KeyValue(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in config.layers]
    return Cache(jnp.zeros((rows, group, config.embed), dtype), own)


def sample_keys(key: Key[Array, ""], rows: Rows) -> Key[Array, "n k"]:
    """One key per completion, from the group's id and the sample's: the same whatever the row and the neighbours."""
    fold = jax.random.fold_in
    return jax.vmap(lambda group, samples: jax.vmap(partial(fold, fold(key, group)))(samples))(
        rows.group_id, rows.sample
    )


def _bare(own: list[KeyValue]) -> list[KeyValue]:
    """The caches of a single row without the dims of size 1 before the tokens; of several rows, as they are.

    XLA's CPU compiler leaves such dims out where it multiplies, as a second result of the write, for which it copies the
    cache: four copies a token of every cache, a tenth of the time of eight completions of one prompt.
    """
    if own[0].key.shape[0] > 1:
        return own
    return jax.tree.map(lambda x: x.reshape(*(size for size in x.shape[:3] if size > 1), *x.shape[3:]), own)


def _write(cache: Float[Array, "*rows d h"], new: Float[Array, "n k g h"], step: Int[Array, "n"]) -> Array:
    """A bare cache with one more token at index `step[n]` of every completion of row n; written where it stands."""
    tokens = new.reshape(*cache.shape[:-2], 1, cache.shape[-1]).astype(cache.dtype)
    if len(step) == 1:
        return jax.lax.dynamic_update_slice_in_dim(cache, tokens, step[0], axis=cache.ndim - 2)

    # Row by row: of an index by (row, step) the compiler would not see that each device writes into its own rows.
    def row(old: Array, token: Array, at: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old, token, at, axis=old.ndim - 2)

    return jax.vmap(row)(cache, tokens, step)


def _advance(
    model: Model,
    network: Network,
    tokens: Int[Array, "n k"],
    tables: Tables,
    rows: Rows,
    shared: list[KeyValue],
    own: list[KeyValue],
) -> tuple[Float[Array, "n k embed"], list[KeyValue]]:
    """The states after `tokens`, which stand at index `rows.step`, and the completions' own bare caches with them."""
    n, k = tokens.shape
    config = model.config.decoder
    step = rows.step[:, None]  # [n, 1]
    # Distance to each key along the path prompt -> completion, in tokens.
    far = (rows.prompt_length[:, None] + step) - jnp.arange(shared[0].value.shape[2])  # [n, p]
    near = step - jnp.arange(own[0].key.shape[-2])  # [n, d]
    real = (far > step, near >= 0)
    grown: list[KeyValue] = []

    def attend(layer: int, q: Array, kv: KeyValue, window: int | None) -> Array:
        grown.append(KeyValue(*(_write(old, new, rows.step) for old, new in zip(own[layer], kv, strict=True))))
        masks = real if window is None else tuple(r & (d < window) for r, d in zip(real, (far, near), strict=True))
        full = KeyValue(*(x.reshape(n, k, config.kv_heads, *x.shape[-2:]) for x in grown[layer]))
        out = attend_decode(q.reshape(n, k, config.kv_heads, -1, config.head_dim), shared[layer], full, masks)
        return out.reshape(n, k, config.heads, config.head_dim)

    attends = [partial(attend, layer) for layer in range(len(own))]
    states = network.language_model.with_caches(network.language_model.embed(tokens), tables, attends)
    return states, grown


class Drawn(NamedTuple):
    """What a block of decoding drew, stop tokens and what follows them included."""

    tokens: Int[Array, "n k b"]
    logp: Float[Array, "n k b"]
    kept_logp: Float[Array, "n k b"]


def decode(
    model: Model,
    params: Params,
    cache: Cache,
    shared: list[KeyValue],
    rows: Rows,
    key: Key[Array, ""],
    *,
    steps: int,
    sampling: Sampling,
) -> tuple[Cache, Drawn]:
    """`steps` more tokens of every completion. Finished ones run along: the host drops what comes after their end.

    The key of a draw is derived from (`key`, `rows.group_id`, sample id, position): it does not depend on the row, the
    number of rows or how far the neighbours have come.
    """
    n, k = rows.sample.shape
    keys = sample_keys(key, rows).reshape(n * k)
    # Of the whole block at once: in the loop, every layer would make the cosines and sines anew. Generated text: under
    # M-RoPE its three coordinates are equal, which is what the decoder makes of one.
    position = (rows.next_position + rows.step)[:, None] + jnp.arange(steps)
    tables = bind_for_decoding(model, params).language_model.tables(position)

    def one(index: Array, carry: tuple[Cache, Drawn]) -> tuple[Cache, Drawn]:
        cache, drawn = carry
        now = rows._replace(step=rows.step + index)
        network = bind_for_decoding(model, params)
        with jax.named_scope("draw"):
            logits = output_logits(model, network, cache.states.reshape(n * k, -1))
            place = jax.vmap(jax.random.fold_in)(keys, jnp.repeat(now.step, k))
            picked: Draw = draw(logits, place, sampling)
        drawn = Drawn(
            *(
                jax.lax.dynamic_update_index_in_dim(old, new.reshape(n, k), index, axis=2)
                for old, new in zip(drawn, picked, strict=True)
            )
        )
        with jax.named_scope("decode"):
            here = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=1), tables)
            found = _advance(model, network, picked.token.reshape(n, k), here, now, shared, cache.own)
        return Cache(*found), drawn

    shape = (n, k, steps)
    empty = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape))
    end, drawn = jax.lax.fori_loop(0, steps, one, (cache._replace(own=_bare(cache.own)), empty))
    return end._replace(own=jax.tree.map(lambda x, old: x.reshape(old.shape), end.own, cache.own)), drawn


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

    One program: prefill, then blocks until every completion has stopped. Sample ids count from `first_sample`.
    """
    n, steps = batch.tokens.shape[0], block_length(completion)
    room = -(-completion // steps) * steps
    prompts, prompt_length = prefill(model, params, batch), jnp.sum(batch.segment == 0, axis=1)
    rows = Rows(
        prompt_length=prompt_length,
        next_position=after_prompt(batch),
        group_id=jnp.asarray(batch.group_id),
        sample=jnp.broadcast_to(first_sample + jnp.arange(group), (n, group)),
        step=jnp.zeros((n,), jnp.int32),
    )
    stops = jnp.asarray(stop_ids, jnp.int32)
    cache = empty_cache(model, rows=n, group=group, length=room)
    shape = (n, group, room)
    states = jnp.broadcast_to(prompts.last[:, None], cache.states.shape)

    class State(NamedTuple):
        done: Int[Array, ""]
        running: Array  # [n, k] bool
        cache: Cache
        drawn: Drawn

    def block(state: State) -> State:
        cache, new = decode(
            model,
            params,
            state.cache,
            prompts.shared,
            rows._replace(step=jnp.broadcast_to(state.done, (n,))),
            key,
            steps=steps,
            sampling=sampling,
        )
        drawn = Drawn(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, piece, state.done, axis=2)
                for old, piece in zip(state.drawn, new, strict=True)
            )
        )
        running = state.running & ~jnp.any(jnp.isin(new.tokens, stops), axis=-1)
        return State(state.done + steps, running, cache, drawn)

    end = jax.lax.while_loop(
        lambda s: (s.done < completion) & jnp.any(s.running),
        block,
        State(
            done=jnp.zeros((), jnp.int32),
            # Rows without a prompt count as stopped from the start.
            running=jnp.broadcast_to((prompt_length > 0)[:, None], (n, group)),
            cache=cache._replace(states=states),
            drawn=Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(shape)),
        ),
    )
    drawn = Drawn(*(x[..., :completion] for x in end.drawn))
    is_stop = jnp.isin(drawn.tokens, stops) & (jnp.arange(completion) < end.done)
    real = (prompt_length > 0)[:, None]
    stopped = jnp.any(is_stop, axis=-1) | ~real
    length = jnp.where(jnp.any(is_stop, axis=-1), jnp.argmax(is_stop, axis=-1) + 1, completion)
    length = jnp.where(real, length, 0)
    tokens, logp, kept = (jnp.where(jnp.arange(completion) < length[..., None], x, 0) for x in drawn)
    return Rollout(tokens, length, stopped, logp, kept)
