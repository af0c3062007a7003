"""Log-probabilities of given continuations. All continuations of one context are one group: its prompt is computed once.

`score_groups` takes groups, with images or without; `score` takes (context, continuation) pairs of token ids.

Batches are planned so that few programs compile: lengths grow in steps of at most a half, and requests of like shape
run together under a budget of tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vlmalign.data.groups import round_up
from vlmalign.mesh import on_mesh, put_batch, row_shares
from vlmalign.models.model import Model, Params
from vlmalign.objectives.logprobs import score_logits
from vlmalign.rollout.features import FeatureStore, assemble
from vlmalign.shapes import Array, Bool, Float
from vlmalign.types import Group, GroupBatch, Layout, Segment

#: smallest room for a prompt and for a continuation, tokens
PROMPT, COMPLETION = 32, 4
#: fewest rows of a batch, if the budget allows them: small rests then share one program
ROWS = 8


class Request(NamedTuple):
    """Token ids: a context, never empty (text without one takes BOS), and the continuation to score."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """Of one continuation."""

    logp: float  #: natural logarithm of the whole continuation's probability, summed in float64
    greedy: bool  #: each of its tokens is the most likely one at its place


class ContinuationScores(NamedTuple):
    """Of one continuation, by token."""

    logp: np.ndarray  #: [length] float32: natural logarithm of each token's probability, given all before it
    greedy: np.ndarray  #: [length] bool: the token is the most likely one at its place

    @property
    def total(self) -> float:
        """Natural logarithm of the whole continuation's probability, summed in float64."""
        return float(self.logp.sum(dtype=np.float64))


class Scored(NamedTuple):
    """Scores in the order of the requests, and the number of prompts that were computed for them."""

    scores: list[Score]
    prompts: int


class TokenChecks(NamedTuple):
    """Per continuation token; padding holds values of no meaning."""

    logp: Float[Array, "n k c"]
    greedy: Bool[Array, "n k c"]


class Batch(NamedTuple):
    """Groups that run together in `rows` rows of one layout."""

    groups: list[Group]
    layout: Layout
    rows: int


def bucket(length: int, least: int) -> int:
    """The smallest of least x 1, 1.5, 2, 3, 4, 6, 8, ... that is >= `length`, rounded up to a whole number.

    >>> [bucket(n, 32) for n in (1, 33, 48, 49, 65, 1000)], [bucket(n, 1) for n in (1, 2, 3, 5)]
    ([32, 48, 48, 64, 96, 1024], [1, 2, 3, 6])
    """
    size = least
    while size < length:
        if (middle := -(-3 * size // 2)) >= length:
            return middle
        size *= 2
    return size


def text_segment(tokens: Sequence[int]) -> Segment:
    """Tokens without images and without loss weight."""
    count = len(tokens)
    return Segment(np.asarray(tokens, np.int32), np.full(count, -1, np.int32), np.zeros(count, np.float32))


def plan(groups: Sequence[Group], *, budget: int, limit: int | None = None, reserve: int = 0) -> list[Batch]:
    """Cut groups, largest first, into batches of at most `budget` tokens with their padding, and `limit` rows.

    `reserve` tokens are added to each row: what will be generated after a prompt. A row that alone is longer than the
    budget runs alone. Groups of different shape meet only where one size ends within a batch.
    """
    order = sorted(groups, key=_room, reverse=True)  # stable: equal shapes keep their order
    batches: list[Batch] = []
    part: list[Group] = []
    layout = Layout(0, 0, 0)

    def most(layout: Layout) -> int:
        rows = max(1, budget // (layout.row + reserve))
        return rows if limit is None else min(rows, limit)

    def close() -> None:
        if part:
            batches.append(Batch(list(part), layout, min(most(layout), bucket(len(part), ROWS))))
            part.clear()

    for group in order:
        k, prompt, completion = _room(group)
        own = Layout(prompt, k, completion)
        wider = Layout(*map(max, layout, own)) if part else own
        if len(part) >= most(wider):
            close()
            wider = own
        part.append(group)
        layout = wider
    close()
    return batches


def _room(group: Group) -> tuple[int, int, int]:
    """(continuations, prompt, completion) that a group needs, in the steps of `bucket`."""
    longest = max((len(c) for c in group.continuations), default=0)
    count = len(group.continuations)
    return (
        bucket(count, 1) if count else 0,
        bucket(len(group.prompt), PROMPT),
        bucket(longest, COMPLETION) if count else 0,
    )


@partial(jax.jit, static_argnames=("model", "chunk"))
def check_tokens(model: Model, params: Params, batch: GroupBatch, *, chunk: int = 1024) -> TokenChecks:
    """Log-probability of every continuation token, and whether it is the most likely one.

    The head runs over `chunk` tokens at a time: [tokens, vocab] never exists whole.
    """
    prompt, group, completion = batch.layout
    tokens = batch.tokens[:, prompt:].reshape(-1)
    states = model.states(params, batch).reshape(tokens.shape[0], -1)
    head, cap = model.head(params), model.config.decoder.logit_softcap

    def one(piece: tuple[Array, Array]) -> tuple[Array, Array]:
        x, y = piece
        z = jnp.einsum("md,vd->mv", x, head, preferred_element_type=jnp.float32)
        if cap is not None:
            z = cap * jnp.tanh(z / cap)
        return score_logits(z, y).logp, jnp.argmax(z, axis=-1) == y

    with jax.named_scope("check_tokens"):
        if len(tokens) <= chunk:
            found = one((states, tokens))
        else:
            pad = -len(tokens) % chunk
            pieces = (
                jnp.pad(states, ((0, pad), (0, 0))).reshape(-1, chunk, states.shape[-1]),
                jnp.pad(tokens, (0, pad)).reshape(-1, chunk),
            )
            found = [x.reshape(-1)[: len(tokens)] for x in jax.lax.map(one, pieces)]
    return TokenChecks(*(x.reshape(-1, group, completion) for x in found))


def score_groups(
    model: Model,
    params: Params,
    groups: Sequence[Group],
    *,
    features: FeatureStore | None,
    budget: int = 8192,
    limit: int | None = None,
    mesh: Mesh | None = None,
    advance: Callable[[Sequence[int]], None] = lambda numbers: None,
) -> list[list[ContinuationScores]]:
    """Scores of every continuation of every group, in their order; each prompt and each image is computed once.

    `features` encodes the images (None: there are none). At most `budget` tokens (a longer group runs alone) and
    `limit` groups run at once; with a `mesh`, on which `params` live, its devices share these out. `advance` is told
    which groups are done, by their places in `groups`.
    """
    found: list[list[ContinuationScores]] = [[] for _ in groups]
    numbered = [replace(group, id=number) for number, group in enumerate(groups)]
    for batch in plan(numbered, budget=budget, limit=limit):
        padded = [_with_continuations(group, batch.layout.group) for group in batch.groups]
        rows = round_up(batch.rows, row_shares(mesh))
        images = rows * max(len(group.images) for group in batch.groups)
        arrays = assemble(padded, batch.layout, rows=rows, images=images, features=features)
        checks = jax.device_get(on_mesh(check_tokens, mesh)(model, params, put_batch(arrays, mesh)))
        for row, group in enumerate(batch.groups):
            found[group.id] = [
                ContinuationScores(checks.logp[row, k, : len(own)], checks.greedy[row, k, : len(own)])
                for k, own in enumerate(group.continuations)
            ]
        advance([group.id for group in batch.groups])
    return found


def score(
    model: Model,
    params: Params,
    requests: Sequence[Request],
    *,
    budget: int = 8192,
    limit: int | None = None,
    advance: Callable[[int], None] = lambda done: None,
) -> Scored:
    """The score of each request, one prompt computed per distinct context.

    Equal requests are computed once. The continuations of a context share a group unless they would not fit `budget`
    tokens together; then the context is computed once per part. `limit` bounds the prompts that run at once.
    `advance(n)` is called as requests are done.

    Raises:
        ValueError: for an empty context or continuation.
    """
    empty = sum(not r.continuation or not r.context for r in requests)
    if empty:
        raise ValueError(
            f"{empty} of {len(requests)} requests have an empty context or continuation; nothing can be scored there"
        )
    groups, owners = _share_contexts(requests, budget=budget)
    asked = Counter(requests)

    def done(numbers: Sequence[int]) -> None:
        advance(sum(asked[request] for number in numbers for request in owners[number]))

    found = score_groups(model, params, groups, features=None, budget=budget, limit=limit, advance=done)
    known = {
        request: Score(one.total, bool(one.greedy.all()))
        for own, scores in zip(owners, found, strict=True)
        for request, one in zip(own, scores, strict=True)
    }
    return Scored([known[request] for request in requests], len(groups))


def _share_contexts(requests: Sequence[Request], *, budget: int) -> tuple[list[Group], list[list[Request]]]:
    """Groups of distinct requests with equal contexts, numbered from 0, and the requests of each."""
    contexts: dict[tuple[int, ...], list[Request]] = {}
    for request in dict.fromkeys(requests):
        contexts.setdefault(request.context, []).append(request)
    owners: list[list[Request]] = []
    for context, rest in contexts.items():
        rest = sorted(rest, key=lambda r: len(r.continuation), reverse=True)
        while rest:
            free = budget - bucket(len(context), PROMPT)
            count = max(1, free // bucket(len(rest[0].continuation), COMPLETION))
            owners.append(rest[:count])
            rest = rest[count:]
    groups = [
        Group(number, text_segment(part[0].context), tuple(text_segment(r.continuation) for r in part), ())
        for number, part in enumerate(owners)
    ]
    return groups, owners


def _with_continuations(group: Group, count: int) -> Group:
    """The group with empty continuations up to `count`: a batch has one number of them."""
    missing = (text_segment(()),) * (count - len(group.continuations))
    return Group(group.id, group.prompt, group.continuations + missing, group.images)
