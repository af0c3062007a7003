"""What only a GPU can show: cuDNN's attention with the models' own head sizes, and the other implementations beside it.

Everywhere else these are skipped. On a machine with a GPU: `JAX_PLATFORMS=cuda pytest tests/gates/test_real_gpu.py`; the
parity tests run there as they are (`JAX_PLATFORMS=cuda pytest tests/models tests/rollout`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlmalign.models.attention import (
    IMPLEMENTATIONS,
    KeyValue,
    Places,
    attend_both_ways,
    cudnn_refusal,
    group_attention,
)
from vlmalign.types import Layout

LAYOUT = Layout(24, 3, 40)
ROWS, KV_HEADS, REPEAT = 2, 2, 2

pytestmark = pytest.mark.skipif(jax.devices()[0].platform != "gpu", reason="needs a GPU: JAX_PLATFORMS=cuda pytest ...")


def places() -> Places:
    """Prompts of 24 and 17 tokens with an image in each, three continuations of up to 40."""
    prompt, group, completion = LAYOUT
    segment = np.full((ROWS, LAYOUT.row), -1, np.int32)
    order, block = np.zeros_like(segment), np.full_like(segment, -1)
    for row, (length, ends) in enumerate(((24, (40, 7, 31)), (17, (1, 40, 22)))):
        segment[row, :length], order[row, :length], block[row, 3:12] = 0, np.arange(length), 0
        for k, end in enumerate(ends):
            at = prompt + k * completion
            segment[row, at : at + end] = k + 1
            order[row, at : at + end] = length + np.arange(end)
    assert group == 3
    return Places(*map(jnp.asarray, (segment, order, block)))


def relative(found, wanted) -> float:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", ["joint", "chunked", "cudnn"])
def test_attention_in_bfloat16_equals_float32(name, window, head_dim):
    """Values and gradients of real tokens, by relative norm: bfloat16 rounds at 2^-9."""
    if refusal := (cudnn_refusal(head_dim, jnp.dtype("bfloat16")) if name == "cudnn" else None):
        pytest.skip(refusal)
    where = places()
    keys = jax.random.split(jax.random.key(head_dim), 4)
    shape = (ROWS, LAYOUT.row, KV_HEADS, head_dim)
    q = jax.random.normal(keys[0], (ROWS, LAYOUT.row, KV_HEADS * REPEAT, head_dim)) * head_dim**-0.5
    k, v = jax.random.normal(keys[1], shape), jax.random.normal(keys[2], shape)
    cotangent = jax.random.normal(keys[3], q.shape) * (where.segment >= 0)[..., None, None]
    q, k, v = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (q, k, v))

    @partial(jax.jit, static_argnames=("name", "dtype"))
    def run(q, k, v, *, name, dtype):
        def attend(q, k, v):
            kv = KeyValue(k.astype(dtype), v.astype(dtype))
            out = group_attention(q.astype(dtype), kv, where, LAYOUT, window, name=name).astype(jnp.float32)
            return jnp.sum(out * cotangent), out * (where.segment >= 0)[..., None, None]

        (_, out), slopes = jax.value_and_grad(attend, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *slopes

    assert name in IMPLEMENTATIONS
    wanted = run(q, k, v, name="joint", dtype=jnp.float32)
    for part, found, expected in zip("oqkv", run(q, k, v, name=name, dtype=jnp.bfloat16), wanted, strict=True):
        assert relative(found, expected) < 1e-2, part


def test_the_tower_takes_cudnn_with_its_heads_of_72():
    assert cudnn_refusal(72, jnp.dtype("bfloat16")) is None
    q, k, v = (
        jax.random.normal(key, (2, 96, 4, 72)).astype(jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)
    )
    real = jnp.arange(96)[None] < jnp.array([[96], [70]])
    program = jax.jit(attend_both_ways)
    assert "cudnn" in program.lower(q, k, v, real).compile().as_text()
    found = program(q, k, v, real)
    wide = program(*(x.astype(jnp.float32) for x in (q, k, v)), real)
    assert relative(found[:1], wide[:1]) < 1e-2
    assert relative(found[1:, :70], wide[1:, :70]) < 1e-2
