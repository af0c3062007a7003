"""Attention over a group: prompt keys shared by all K continuations, own keys for each, one joint softmax.

Token t sees token s iff segment(s) is 0 or t's own, and order(s) <= order(t) or both lie in one image block, and, in
a local layer, order(t) - order(s) < window. The rectangle (P; K x C) makes this three dense pieces: prompt on prompt,
continuation on prompt, continuation on itself. No prompt key is ever copied per continuation.

Alphabet: n row, s segment, c query, d own key, p prompt key, g kv head, r query heads per kv head, h head dim.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from vlmalign.models.product import contract
from vlmalign.shapes import Array, Bool, Float, Int
from vlmalign.types import Layout

#: finite, so that a padding query (which sees nothing) averages values instead of making NaN
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)

#: queries per chunk of the "chunked" implementation
CHUNK = 512


class Places(NamedTuple):
    """Where tokens stand, as the visibility rule needs it; arrays of equal shape."""

    segment: Int[Array, "*batch tokens"]
    order: Int[Array, "*batch tokens"]
    block: Int[Array, "*batch tokens"]


class KeyValue(NamedTuple):
    """Keys and values [..., tokens, kv_heads, head_dim]."""

    key: Float[Array, "*batch tokens kv_heads head_dim"]
    value: Float[Array, "*batch tokens kv_heads head_dim"]


def visible(query: Places, key: Places, window: int | None) -> Bool[Array, "*batch query key"]:
    """True where the query token may look at the key token.

    >>> row = Places(jnp.array([0, 0, 1, -1]), jnp.array([0, 1, 2, 0]), jnp.array([-1, -1, -1, -1]))
    >>> visible(row, row, None).astype(int).tolist()
    [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0]]
    """
    ks, qs = key.segment[..., None, :], query.segment[..., :, None]
    distance = query.order[..., :, None] - key.order[..., None, :]
    same_block = (query.block[..., :, None] == key.block[..., None, :]) & (key.block[..., None, :] >= 0)
    seen = ((ks == 0) | ((ks == qs) & (ks > 0))) & ((distance >= 0) | same_block)
    return seen if window is None else seen & (distance < window)


def attend_segments(
    q: Float[Array, "n s c g r h"],
    own: KeyValue,
    own_mask: Bool[Array, "n s c d"],
    shared: KeyValue | None = None,
    shared_mask: Bool[Array, "n s c p"] | None = None,
) -> Float[Array, "n s c g r h"]:
    """Attention of S segments of queries over [shared keys | the segment's own keys], one softmax over both.

    `own` is [n, s, d, g, h], `shared` [n, p, g, h]. Scores and softmax are float32; queries come scaled.
    """
    scores = contract(q, own.key, "nscgrh,nsdgh->ngscrd")
    scores = jnp.where(own_mask[:, None, :, :, None, :], scores, MASKED)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if shared is not None:
        far = contract(q, shared.key, "nscgrh,npgh->ngscrp")
        far = jnp.where(shared_mask[:, None, :, :, None, :], far, MASKED)
        top = jnp.maximum(top, jnp.max(far, axis=-1, keepdims=True))
    top = jax.lax.stop_gradient(top)
    weights = jnp.exp(scores - top)  # [n, g, s, c, r, d]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = contract(weights.astype(q.dtype), own.value, "ngscrd,nsdgh->ngscrh")
    if shared is not None:
        weights = jnp.exp(far - top)  # [n, g, s, c, r, p]
        total = total + jnp.sum(weights, axis=-1, keepdims=True)
        out = out + contract(weights.astype(q.dtype), shared.value, "ngscrp,npgh->ngscrh")
    return jnp.moveaxis(out / total, 1, 3).astype(q.dtype)


def attend_from(
    q: Float[Array, "n 1 heads h"], kv: KeyValue, places: Places, index: Int[Array, "n"], window: int | None
) -> Float[Array, "n 1 heads h"]:
    """What one token of each row sees of its row: `q` is of the token at `index`; `kv` and `places` are of all tokens."""
    g = kv.key.shape[2]
    here = Places(*(jnp.take_along_axis(x, index[:, None], axis=1) for x in places))  # [n, 1]
    grouped = q.reshape(len(q), 1, 1, g, -1, q.shape[-1])  # [n, s, c, g, r, h]
    own = KeyValue(*(x[:, None] for x in kv))
    return attend_segments(grouped, own, visible(here, places, window)[:, None]).reshape(q.shape)


def attend_decode(
    q: Float[Array, "n k g r h"],
    shared: KeyValue,
    own: KeyValue,
    masks: tuple[Bool[Array, "n p"], Bool[Array, "n d"]],
) -> Float[Array, "n k g r h"]:
    """Attention of one query per continuation over shared keys and its own; one softmax over both.

    `shared` has keys [n, g, h, p] and values [n, g, p, h], `own` both as [n, k, g, d, h]: so laid out, every product runs
    over the caches as they stand. `masks` are of the shared keys and of the own. Scores and softmax are float32; queries
    come scaled.
    """
    far = jnp.moveaxis(jnp.einsum("nkgrh,nghp->ngkrp", q, shared.key, preferred_element_type=jnp.float32), 1, 2)
    near = jnp.einsum("nkgrh,nkgdh->nkgrd", q, own.key, preferred_element_type=jnp.float32)
    # One array for the softmax: so little is computed here that every operation counts, whatever its size.
    seen = jnp.concatenate(masks, axis=-1)[:, None, None, None]
    scores = jnp.where(seen, jnp.concatenate([far, near], axis=-1), MASKED)
    # Masked once more: with a selection in between, XLA's CPU compiler takes exponentials in its own loop and not in a
    # library's, which needs twice as long for so few. Every query sees itself: no row is masked whole.
    scores = jnp.where(seen, scores - jnp.max(scores, axis=-1, keepdims=True), MASKED)
    weights = jnp.exp(scores)  # [n, k, g, r, p + d]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    far, near = jnp.split(weights.astype(q.dtype), [shared.value.shape[2]], axis=-1)
    out = jnp.moveaxis(
        jnp.einsum("ngkrp,ngph->ngkrh", jnp.moveaxis(far, 2, 1), shared.value, preferred_element_type=jnp.float32), 1, 2
    )
    out += jnp.einsum("nkgrd,nkgdh->nkgrh", near, own.value, preferred_element_type=jnp.float32)
    return (out / total).astype(q.dtype)


def _attend_in_chunks(
    q: Float[Array, "n s c g r h"],
    places: Places,
    own: KeyValue,
    own_places: Places,
    shared: KeyValue | None,
    shared_places: Places | None,
    window: int | None,
    chunk: int,
) -> Float[Array, "n s c g r h"]:
    """`attend_segments` for `chunk` queries at a time, recomputed in the backward pass."""
    length = q.shape[2]
    count = -(-length // chunk)
    pad = count * chunk - length

    def cut(x: Array) -> Array:  # [n, s, c, ...] -> [count, n, s, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(*x.shape[:2], count, chunk, *x.shape[3:]), 2, 0)

    @jax.checkpoint
    def one(piece: tuple[Array, Places]) -> Array:
        queries, where = piece
        far = None if shared_places is None else visible(where, shared_places, window)
        return attend_segments(queries, own, visible(where, own_places, window), shared, far)

    pieces = jax.lax.map(one, (cut(q), jax.tree.map(cut, places)))  # [count, n, s, chunk, g, r, h]
    joined = jnp.moveaxis(pieces, 0, 2)
    return joined.reshape(*joined.shape[:2], count * chunk, *joined.shape[4:])[:, :, :length]


def _segments(
    q: Float[Array, "n t heads h"],
    kv: KeyValue,
    places: Places,
    layout: Layout,
    window: int | None,
    *,
    chunk: int | None,
) -> Float[Array, "n t heads h"]:
    """Group attention on the static rectangle; all queries at once, or `chunk` of them at a time."""
    n, _, heads, h = q.shape
    g = kv.key.shape[2]
    prompt, group, completion = layout
    grouped = q.reshape(n, layout.row, g, heads // g, h)  # [n, t, g, r, h]

    def head(x: Array) -> Array:
        return x[:, :prompt]

    def tail(x: Array) -> Array:  # [n, t, ...] -> [n, s, c, ...]
        return x[:, prompt:].reshape(n, group, completion, *x.shape[2:])

    def lift(x: Array) -> Array:
        return x[:, None]

    def run(queries: Array, where: Places, own: KeyValue, own_places: Places, shared, shared_places) -> Array:
        if chunk is not None:
            return _attend_in_chunks(queries, where, own, own_places, shared, shared_places, window, chunk)
        far = None if shared_places is None else visible(where, shared_places, window)
        return attend_segments(queries, own, visible(where, own_places, window), shared, far)

    prompt_kv, prompt_places = KeyValue(*map(head, kv)), Places(*map(head, places))
    prompt_segment = Places(*map(lift, prompt_places))
    out = run(lift(head(grouped)), prompt_segment, KeyValue(*map(lift, prompt_kv)), prompt_segment, None, None).reshape(
        n, prompt, heads, h
    )
    if group == 0:
        return out
    own, own_places = KeyValue(*map(tail, kv)), Places(*map(tail, places))
    answers = run(tail(grouped), own_places, own, own_places, prompt_kv, Places(*map(lift, prompt_places)))
    return jnp.concatenate([out, answers.reshape(n, group * completion, heads, h)], axis=1)


def _cudnn(
    q: Float[Array, "n t heads h"], kv: KeyValue, places: Places, layout: Layout, window: int | None
) -> Float[Array, "n t heads h"]:
    """cuDNN's fused attention over the whole row with a dense mask: no score matrix in memory, more arithmetic."""
    del layout
    return jax.nn.dot_product_attention(
        q, kv.key, kv.value, mask=visible(places, places, window)[:, None], scale=1.0, implementation="cudnn"
    )


def attend_both_ways(
    q: Float[Array, "n t heads h"],
    k: Float[Array, "n t heads h"],
    v: Float[Array, "n t heads h"],
    real: Bool[Array, "n t"] | None = None,
) -> Float[Array, "n t heads h"]:
    """Attention of a vision tower: every token sees every one of its row, those that are not `real` left out."""
    # Held whole, the scores of eight 896 px films take 12 GiB; cuDNN's kernel keeps them on the chip.
    kind = "xla" if cudnn_refusal(q.shape[-1], q.dtype) else "cudnn"
    mask = None if real is None else jnp.broadcast_to(real[:, None, None, :], (*real.shape[:1], 1, *real.shape[1:] * 2))
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=kind)


#: every implementation the resolver can choose; all compute the same function
IMPLEMENTATIONS = {
    "joint": partial(_segments, chunk=None),
    "chunked": partial(_segments, chunk=CHUNK),
    "cudnn": _cudnn,
}


class Choice(NamedTuple):
    """An attention implementation and why it was taken."""

    name: str
    reason: str


def cudnn_refusal(head_dim: int, dtype: jnp.dtype) -> str | None:
    """Why cuDNN's fused attention cannot run on this device with this head size and dtype; None when it can."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return f"no GPU (the device is {device.platform})"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention needs bfloat16, the model runs in {jnp.dtype(dtype).name}"
    major = int(str(device.compute_capability).split(".")[0])
    limit = 256 if major >= 9 else 128
    if head_dim > limit:
        return f"head size {head_dim} is above cuDNN's {limit} on compute capability {device.compute_capability}"
    return None


def resolve_attention(requested: str, *, layout: Layout, head_dim: int, dtype: jnp.dtype) -> Choice:
    """The implementation for these static shapes on this device. `requested` is a name or "auto".

    Raises ValueError for an unknown name, and for "cudnn" where it cannot run.
    """
    if requested != "auto" and requested not in IMPLEMENTATIONS:
        raise ValueError(f"attention must be auto or one of {', '.join(IMPLEMENTATIONS)}; found {requested!r}")
    refusal = cudnn_refusal(head_dim, dtype)
    if requested == "cudnn" and refusal:
        raise ValueError(f"attention 'cudnn' cannot run here: {refusal}; set attention to auto")
    if requested != "auto":
        return Choice(requested, "as requested")
    longest = max(layout.prompt, layout.completion)
    if longest > 2 * CHUNK:
        return Choice("chunked", f"{longest} queries in one segment: a whole score matrix would not be held")
    # cuDNN works on every pair of the row, T x T; the rectangle leaves out the pairs of different continuations. Updates
    # of MedGemma-4B on an H200 (prompts of 456, 4 x 512 tokens) took .92 s so and 1.10 with cuDNN, which needs a quarter
    # less temporary memory (24.2 in place of 32.5 GiB for two groups without rematerialisation).
    why = (
        refusal or "cuDNN would also compute what continuations never see of each other; request it where memory binds"
    )
    return Choice("joint", f"the longest segment has {longest} queries; {why}")


def group_attention(
    q: Float[Array, "n t heads h"], kv: KeyValue, places: Places, layout: Layout, window: int | None, *, name: str
) -> Float[Array, "n t heads h"]:
    """Attention of every token of a batch of groups; queries come scaled; `name` is one of `IMPLEMENTATIONS`."""
    with jax.named_scope(f"group_attention_{name}"):
        return IMPLEMENTATIONS[name](q, kv, places, layout, window)
