"""What the compiled programs of a rollout hold, and what they do not. No clock."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import SOFT_TOKENS, VOCAB, group, put, text, vlm

from vlmalign.rollout import cache as programs
from vlmalign.rollout.compaction import DecodeShape
from vlmalign.rollout.decode_weights import joined, with_made
from vlmalign.rollout.engine import Rows, prefill
from vlmalign.rollout.features import assemble
from vlmalign.rollout.sampling import Sampling
from vlmalign.types import Group, Layout, Segment

ROWS, GROUP, LENGTH, STEPS, PROMPT = 3, 5, 40, 4, 24
EVERYTHING = Sampling(temperature=0.7, top_p=0.8, top_k=9, min_p=0.02)


def computations(program: str) -> dict[str, str]:
    """The bodies of a compiled program's computations by name; the one that is run is "ENTRY"."""
    found = {}
    for match in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL):
        found["ENTRY" if match[1] else match[2]] = match[3]
    return found


def lower(checkpoint, weights, sampling=EVERYTHING, count=ROWS):
    cache, shared = programs.empty_program(checkpoint.model, shape=DecodeShape(count, GROUP, LENGTH), prompt=PROMPT)
    zeros = np.zeros(count, np.int32)
    rows = Rows(zeros + 3, zeros + 3, zeros, np.zeros((count, GROUP), np.int32), zeros)
    lowered = programs.decode_program.lower(
        checkpoint.model, weights, cache, shared, rows, jax.random.key(0), steps=STEPS, sampling=sampling
    )
    return lowered, cache


@pytest.fixture(scope="module")
def decode():
    """The decode program as it is run after a merge: on joined weights."""
    lowered, cache = lower(text(), joined(text().model, text().params))
    return lowered.compile(), cache


def test_prefill_makes_no_logits():
    """No array ends in the vocabulary: the prompts' states end where decoding begins."""
    batch = put([group(1, [2, "a", 5]), group(2, [3, 4])], Layout(PROMPT, 0, 0))
    batch = batch._replace(pixels=None, features=np.zeros((SOFT_TOKENS, 32), np.float32))
    program = programs.prefill_program.lower(vlm().model, vlm().params, batch).compile().as_text()
    assert f"f32[{VOCAB},32]" in program, "the embedding is there"
    assert not re.search(rf"\[(\d+,)+{VOCAB}\]", program)
    assert not re.search(rf"\[(\d+,)*{2 * PROMPT},{VOCAB}\]", program)


def test_prompts_are_held_once_and_not_per_completion(decode):
    program, g, h = decode[0].as_text(), 1, 16
    assert f"[{ROWS},{g},{h},{PROMPT}]" in program
    for copy in (
        f"[{ROWS},{GROUP},{g},{h},{PROMPT}]",
        f"[{ROWS * GROUP},{g},{h},{PROMPT}]",
        f"[{ROWS},{GROUP},{g},{PROMPT},{h}]",
    ):
        assert copy not in program


def test_decoding_copies_no_cache_and_no_weights(decode):
    """Within the loop over tokens. The caches that are donated are all that grows."""
    program, cache = decode
    bodies = computations(program.as_text())
    kv = f"f32[{ROWS},{GROUP},1,{LENGTH},16]"
    assert any(kv in body for name, body in bodies.items() if name != "ENTRY")
    sizes = {kv, f"f32[{ROWS},1,16,{PROMPT}]", f"f32[{ROWS},1,{PROMPT},16]"}
    for name, shape in text().model.shapes.items():
        if len(shape.shape) == 2:
            sizes |= {f"f32[{shape.shape[0]},{shape.shape[1]}]", f"f32[{shape.shape[1]},{shape.shape[0]}]"}
        assert name.startswith("language_model.")
    moved = [
        line.strip()
        for name, body in bodies.items()
        if name != "ENTRY"
        for line in body.splitlines()
        if re.search(r" (copy|transpose)\(", line) and any(f"= {size}{{" in line for size in sizes)
    ]
    assert moved == []
    donated = sum(x.nbytes for x in jax.tree.leaves(cache))
    assert program.memory_analysis().alias_size_in_bytes == donated


@pytest.mark.full
def test_decoding_one_row_copies_no_cache_for_a_token():
    """Once for a block at most: dims of size 1 are where XLA's CPU compiler likes to copy."""
    lowered, cache = lower(text(), text().params, count=1)
    compiled = lowered.compile()
    size = cache.own[0].key.size
    program = compiled.as_text()
    loops, bodies = re.findall(r"body=%([\w.\-]+)", program), computations(program)
    made = [
        (math.prod(map(int, shape.split(","))), operation)
        for loop in loops
        for shape, operation in re.findall(r"= f32\[([\d,]+)\]\S* ([\w\-]+)\(", bodies[loop])
    ]
    writes = [operation for elements, operation in made if elements == size and operation == "fusion"]
    assert len(writes) == 2 * len(cache.own), "keys and values of every layer are written once"
    assert not [operation for elements, operation in made if elements == size and operation == "copy"]
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(cache))


def test_drawing_sorts_nothing_and_needs_one_random_number_per_row(decode):
    """Under top-k, top-p and min-p together."""
    program = decode[0].as_text()

    def sorts(program: str) -> bool:
        return bool(re.search(r"\bsort\(", program))

    def random_bits(program: str) -> bool:
        return bool(re.search(rf"u32\[(\d+,)*{VOCAB}(,\d+)*\]", program))

    assert not sorts(program)
    assert not random_bits(program)
    logits = jnp.zeros((4, VOCAB))
    naive = jax.jit(lambda z: (jnp.sort(z), jax.random.categorical(jax.random.key(0), z))).lower(logits).compile()
    assert sorts(naive.as_text())
    assert random_bits(naive.as_text())


def test_states_do_not_depend_on_the_form_of_the_weights():
    """Prompts through joined matrices in one layer and plain ones in the others; the forms stand for all parameters."""
    own = text()
    first = "language_model.layers.0."
    formed = with_made(own.model, own.params, joined(own.model, {n: v for n, v in own.params.items() if first in n}))
    for name, parts in {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }.items():
        wanted = np.concatenate([own.params[f"{first}{part}.weight"] for part in parts])
        assert np.array_equal(formed[f"{first}{name}.weight"], wanted)
        assert not any(f"{first}{part}.weight" in formed for part in parts)
    assert len(formed) == len(own.params) - 5 + 2
    batch = assemble([Group(0, Segment(*_blank(9)), (), ())], Layout(12, 0, 0), rows=1, images=1, features=None)
    found, plain = (jax.jit(partial(prefill, own.model))(params, batch) for params in (formed, own.params))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(plain), strict=True):
        assert np.allclose(one, other, rtol=1e-5, atol=1e-5)


def _blank(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.arange(3, 3 + length, dtype=np.int32), np.full(length, -1, np.int32), np.ones(length, np.float32)
