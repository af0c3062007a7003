"""What the compiled programs of a rollout hold, and what they do not. No clock."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import SOFT_TOKENS, VOCAB, group, put, text, vlm

from vlmalign.rollout import cache as programs
from vlmalign.rollout.compaction import DecodeShape
from vlmalign.rollout.decode_weights import TURNED, decode_weights
from vlmalign.rollout.engine import Rows
from vlmalign.rollout.sampling import Sampling
from vlmalign.types import Layout

ROWS, GROUP, LENGTH, STEPS, PROMPT = 3, 5, 40, 4, 24
EVERYTHING = Sampling(temperature=0.7, top_p=0.8, top_k=9, min_p=0.02)


def computations(program: str) -> dict[str, str]:
    """The bodies of a compiled program's computations by name; the one that is run is "ENTRY"."""
    found = {}
    for match in re.finditer(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", program, re.MULTILINE | re.DOTALL):
        found["ENTRY" if match[1] else match[2]] = match[3]
    return found


def lower(checkpoint, weights, sampling=EVERYTHING):
    cache, shared = programs.empty_program(checkpoint.model, shape=DecodeShape(ROWS, GROUP, LENGTH), prompt=PROMPT)
    zeros = np.zeros(ROWS, np.int32)
    rows = Rows(zeros + 3, zeros + 3, zeros, np.zeros((ROWS, GROUP), np.int32), zeros)
    lowered = programs.decode_program.lower(
        checkpoint.model, weights, cache, shared, rows, jax.random.key(0), steps=STEPS, sampling=sampling
    )
    return lowered, cache


@pytest.fixture(scope="module")
def decode():
    """The decode program as it is run: on turned weights."""
    lowered, cache = lower(text(), decode_weights(text().model, text().params))
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


def test_turned_weights_are_the_same_model_and_live_as_long_as_theirs():
    params = {name: jnp.array(value) for name, value in text().params.items()}
    turned = decode_weights(text().model, params)
    names = [name for name in turned if name.endswith(TURNED)]
    assert len(names) == 3 * 7 + 1, "seven matrices per layer, and the head"
    for name in names:
        assert np.array_equal(turned[name].T, params[name.removesuffix(TURNED)])
    again = decode_weights(text().model, params)
    assert all(again[name] is turned[name] for name in names), "what did not change is not turned again"
    params[names[0].removesuffix(TURNED)] = params[names[0].removesuffix(TURNED)] + 1
    later = decode_weights(text().model, params)
    assert later[names[0]] is not turned[names[0]]
    assert later[names[1]] is turned[names[1]]
