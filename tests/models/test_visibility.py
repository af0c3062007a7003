"""Who sees whom in a group: the rule as a table drawn by hand, and every attention implementation against it."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import QUICK, assert_close

from vlmalign.models.attention import (
    IMPLEMENTATIONS,
    KeyValue,
    Places,
    cudnn_refusal,
    group_attention,
    resolve_attention,
    visible,
)
from vlmalign.types import Layout

# A prompt of a token and an image of four, then padding; two continuations, the second with an image of two.
ROW = Places(
    #                p0 i1 i2 i3 i4 --  b5 c6 d7 --  e5 j6 j7 --
    segment=jnp.array([0, 0, 0, 0, 0, -1, 1, 1, 1, -1, 2, 2, 2, -1]),
    order=jnp.array([0, 1, 2, 3, 4, 0, 5, 6, 7, 0, 5, 6, 7, 0]),
    block=jnp.array([-1, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, 1, 1, -1]),
)

GLOBAL = """
    p0  1 0 0 0 0 0  0 0 0 0  0 0 0 0
    i1  1 1 1 1 1 0  0 0 0 0  0 0 0 0
    i2  1 1 1 1 1 0  0 0 0 0  0 0 0 0
    i3  1 1 1 1 1 0  0 0 0 0  0 0 0 0
    i4  1 1 1 1 1 0  0 0 0 0  0 0 0 0
    b5  1 1 1 1 1 0  1 0 0 0  0 0 0 0
    c6  1 1 1 1 1 0  1 1 0 0  0 0 0 0
    d7  1 1 1 1 1 0  1 1 1 0  0 0 0 0
    e5  1 1 1 1 1 0  0 0 0 0  1 0 0 0
    j6  1 1 1 1 1 0  0 0 0 0  1 1 1 0
    j7  1 1 1 1 1 0  0 0 0 0  1 1 1 0
"""
# At most two tokens back, in images too; i1 still sees i4 ahead of it.
WINDOW_3 = """
    p0  1 0 0 0 0 0  0 0 0 0  0 0 0 0
    i1  1 1 1 1 1 0  0 0 0 0  0 0 0 0
    i2  1 1 1 1 1 0  0 0 0 0  0 0 0 0
    i3  0 1 1 1 1 0  0 0 0 0  0 0 0 0
    i4  0 0 1 1 1 0  0 0 0 0  0 0 0 0
    b5  0 0 0 1 1 0  1 0 0 0  0 0 0 0
    c6  0 0 0 0 1 0  1 1 0 0  0 0 0 0
    d7  0 0 0 0 0 0  1 1 1 0  0 0 0 0
    e5  0 0 0 1 1 0  0 0 0 0  1 0 0 0
    j6  0 0 0 0 1 0  0 0 0 0  1 1 1 0
    j7  0 0 0 0 0 0  0 0 0 0  1 1 1 0
"""
REAL = np.flatnonzero(np.asarray(ROW.segment) >= 0)


def drawn(table: str) -> np.ndarray:
    """[real queries, keys] as bool."""
    return np.array([[int(x) for x in line.split()[1:]] for line in table.strip().splitlines()], bool)


@pytest.mark.parametrize(("window", "table"), [(None, GLOBAL), (3, WINDOW_3)])
def test_the_rule_as_drawn(window, table):
    assert np.array_equal(visible(ROW, ROW, window)[REAL], drawn(table))


def test_a_family_without_two_way_images_is_causal():
    causal = ROW._replace(block=jnp.full(14, -1))
    seen = np.asarray(visible(causal, causal, None)[REAL])
    assert not seen[1, 2]  # i1 no longer sees i2
    assert (seen <= drawn(GLOBAL)).all()


def dense(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Attention in float64 with a 0/1 mask [n, t, t]; a query that sees nothing gives zeros."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), repeat, axis=2) for x in (k, v))
    scores = np.einsum("nqgh,nkgh->ngqk", q.astype(np.float64), k)
    weights = np.where(seen[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0.0)
    weights = weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    return np.einsum("ngqk,nkgh->nqgh", weights, v)


def random_places(rng: np.random.Generator, rows: int, layout: Layout) -> Places:
    """Random lengths, an image run in most segments, one empty continuation, one empty (padding) row."""
    shape = (rows, layout.row)
    segment, block = np.full(shape, -1), np.full(shape, -1)
    order = np.zeros(shape, np.int64)
    for row in range(rows - 1):
        prompt = int(rng.integers(1, layout.prompt + 1))
        pieces = [(0, 0, 0, prompt)]
        for k in range(layout.group):
            length = int(rng.integers(0, layout.completion + 1))
            pieces.append((layout.prompt + k * layout.completion, k + 1, prompt, length))
        for number, (column, name, first, length) in enumerate(pieces):
            segment[row, column : column + length] = name
            order[row, column : column + length] = first + np.arange(length)
            if length >= 3:
                at = int(rng.integers(0, length - 2))
                block[row, column + at : column + at + int(rng.integers(2, length - at + 1))] = number
    return jax.tree.map(jnp.asarray, Places(segment, order, block))


# The sizes at which the chunked implementation cuts are lowered, so that tests of a few tokens are cut at all; neither
# the prompt nor the completion is a multiple.
SMALL_CHUNK = partial(IMPLEMENTATIONS["chunked"], chunk=5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("window", [None, 4])
def test_every_implementation_is_attention_under_the_rule(name, window, monkeypatch):
    dtype = jnp.dtype("bfloat16" if name == "cudnn" else "float32")
    if name == "cudnn" and (reason := cudnn_refusal(16, dtype)):
        pytest.skip(f"attention 'cudnn' not run: {reason}")
    monkeypatch.setitem(IMPLEMENTATIONS, "chunked", SMALL_CHUNK)
    layout = Layout(12, 3, 7)
    attend = jax.jit(partial(group_attention, layout=layout, window=window, name=name), compiler_options=QUICK)
    for seed in range(5):
        rng = np.random.default_rng(seed)
        places = random_places(rng, 4, layout)
        q, k, v = (2 * rng.normal(size=(4, layout.row, g, 16)).astype(np.float32) for g in (4, 2, 2))
        q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
        found = attend(q, KeyValue(k, v), places)
        # The tables above are the rule; here the rectangle and the chunks must lead to the same.
        expected = dense(*map(np.asarray, (q, k, v)), np.asarray(visible(places, places, window)))
        assert np.isfinite(np.asarray(found, np.float32)).all(), "padding queries must stay finite"
        kept = np.asarray(places.segment) >= 0
        assert_close(np.asarray(found, np.float32)[kept], expected[kept], 1e-5 if dtype == jnp.float32 else 3e-2)


def test_a_far_masked_key_with_a_huge_score_changes_nothing():
    """The running maximum is over visible keys only: a masked 1e4 must not push the real weights to zero."""
    layout = Layout(2, 1, 2)
    places = Places(*(jnp.array([x]) for x in ([0, -1, 1, -1], [0, 0, 1, 0], [-1, -1, -1, -1])))
    q = jnp.ones((1, 4, 1, 1))
    k = jnp.array([0.0, 1e4, 0.0, 1e4]).reshape(1, 4, 1, 1)
    v = jnp.array([1.0, 50.0, 3.0, 50.0]).reshape(1, 4, 1, 1)
    found = group_attention(q, KeyValue(k, v), places, layout, None, name="joint")
    assert np.asarray(found).ravel()[[0, 2]].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("requested", "layout", "expected"),
    [
        ("auto", Layout(128, 4, 128), "joint"),
        ("auto", Layout(2048, 4, 128), "chunked"),
        ("auto", Layout(128, 4, 2048), "chunked"),
        ("joint", Layout(2048, 4, 128), "joint"),
        ("chunked", Layout(16, 0, 0), "chunked"),
    ],
)
def test_the_resolver_says_what_and_why(requested, layout, expected):
    choice = resolve_attention(requested, layout=layout, head_dim=16, dtype=jnp.dtype("float32"))
    assert choice.name == expected
    assert choice.reason


def test_the_resolver_refuses_what_cannot_run():
    with pytest.raises(ValueError, match="joint, chunked, cudnn"):
        resolve_attention("flash", layout=Layout(8, 0, 0), head_dim=16, dtype=jnp.dtype("float32"))
    if (reason := cudnn_refusal(16, jnp.dtype("float32"))) is not None:
        with pytest.raises(ValueError, match=re.escape(reason)):
            resolve_attention("cudnn", layout=Layout(8, 0, 0), head_dim=16, dtype=jnp.dtype("float32"))
