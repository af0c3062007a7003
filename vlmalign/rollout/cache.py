"""The compiled programs of a rollout that are called again and again, and the moves of caches between their shapes.

Every change of shape is made array by array, the old one freed before the next: two whole caches never exist at once.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from vlmalign.mesh import ROWS, TENSOR, constrain
from vlmalign.models.attention import KeyValue
from vlmalign.models.compiling import DECODING
from vlmalign.models.model import Model, Params
from vlmalign.rollout.compaction import DecodeShape, Moves
from vlmalign.rollout.engine import Cache, Drawn, Prefilled, Rows, decode, empty_cache, prefill
from vlmalign.rollout.sampling import Sampling
from vlmalign.shapes import Array, Float, Int, Key

prefill_program = jax.jit(prefill, static_argnames="model")


def decode_block(
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
    """`engine.decode`, the caches staying where they are."""
    cache, drawn = decode(model, params, cache, shared, rows, key, steps=steps, sampling=sampling)
    return _placed(cache), drawn


#: the cache is donated: each block writes its tokens where the last one left off
decode_program = jax.jit(
    decode_block,
    static_argnames=("model", "steps", "sampling"),
    donate_argnames="cache",
    compiler_options=dict(DECODING),
)


def _placed(cache: Cache) -> Cache:
    """Cut by rows and key-value heads: where a device's own weights make and read them."""
    own = [KeyValue(*(constrain(x, ROWS, None, TENSOR) for x in kv)) for kv in cache.own]
    return Cache(constrain(cache.states, ROWS), own)


def _placed_prompts(shared: list[KeyValue]) -> list[KeyValue]:
    return [KeyValue(*(constrain(x, ROWS, TENSOR) for x in kv)) for kv in shared]


@partial(jax.jit, static_argnames=("model", "shape", "prompt"))
def empty_program(model: Model, *, shape: DecodeShape, prompt: int) -> tuple[Cache, list[KeyValue]]:
    """Caches without tokens, and room for the keys and values of a prompt of `prompt` tokens in each row."""
    config = model.config.decoder
    cache = empty_cache(model, rows=shape.rows, group=shape.group, length=shape.length)
    n, g, h, dtype = shape.rows, config.kv_heads, config.head_dim, jnp.dtype(model.dtype)
    shared = [KeyValue(jnp.zeros((n, g, h, prompt), dtype), jnp.zeros((n, g, prompt, h), dtype)) for _ in config.layers]
    return _placed(cache), _placed_prompts(shared)


@partial(jax.jit, donate_argnames=("states", "shared"))
def insert_program(
    states: Float[Array, "n k embed"], shared: list[KeyValue], fresh: Prefilled, row: Int[Array, "m"]
) -> tuple[Array, list[KeyValue]]:
    """Put prefilled prompts into these rows; a row past the last one stands for padding, and is dropped."""
    first = jnp.broadcast_to(fresh.last[:, None], (len(row), *states.shape[1:])).astype(states.dtype)
    states = states.at[row].set(first, mode="drop")
    shared = jax.tree.map(lambda old, new: old.at[row].set(new, mode="drop"), shared, fresh.shared)
    return constrain(states, ROWS), _placed_prompts(shared)


@partial(jax.jit, static_argnames="length")
def _resize(x: Float[Array, "n k g d h"], *, length: int) -> Float[Array, "n k g length h"]:
    more = length - x.shape[3]
    resized = x[:, :, :, :length] if more <= 0 else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, more), (0, 0)))
    return constrain(resized, ROWS, None, TENSOR)


@jax.jit
def _take_rows(x: Float[Array, "n *rest"], row: Int[Array, "m"]) -> Float[Array, "m *rest"]:
    return constrain(x[row], ROWS, TENSOR)


@jax.jit
def _take_completions(
    x: Float[Array, "n k *rest"], row: Int[Array, "m"], column: Int[Array, "m j"]
) -> Float[Array, "m j *rest"]:
    # [m, j, kv_heads, ...], or the states [m, j, embed], which are whole
    return constrain(x[row[:, None], column], ROWS, None, *((TENSOR,) if x.ndim > 3 else ()))


def resize(cache: Cache, length: int) -> Cache:
    """The cache with room for `length` tokens of each completion; what is cut off must be unused."""
    own = list(cache.own)
    for layer, kv in enumerate(own):
        if kv.key.shape[3] == length:
            return cache
        own[layer] = KeyValue(*(_resize(x, length=length) for x in kv))
        cache.own[layer] = None
    return Cache(cache.states, own)


def move(cache: Cache, shared: list[KeyValue], moves: Moves) -> tuple[Cache, list[KeyValue]]:
    """Caches of fewer rows or completions; the ones given are used up."""
    row, column = moves
    for layer, kv in enumerate(cache.own):
        cache.own[layer] = KeyValue(*(_take_completions(x, row, column) for x in kv))
    for layer, kv in enumerate(shared):
        shared[layer] = KeyValue(*(_take_rows(x, row) for x in kv))
    return Cache(_take_completions(cache.states, row, column), cache.own), shared
