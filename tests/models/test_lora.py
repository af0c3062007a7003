"""Adapters: nothing changes while B is zero, merged equals unmerged, only the named projections are trained."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoints import QUICK, adapted, assert_close, group, logits, put, vlm

from vlmalign.models.lora import LoraSpec, init_adapter, is_adapter, merge_adapter
from vlmalign.models.model import Model
from vlmalign.types import Layout

BATCH = put([group(0, [2, 5, "a", 8, 9, 10, 11, 12]), group(1, [2, "b", "c", 7]), group(2, [3])], Layout(24, 0, 0))


def adapter_of(params):
    return {name: value for name, value in params.items() if is_adapter(name)}


@pytest.mark.full
def test_a_new_adapter_changes_no_bit():
    model = adapted().model
    fresh = init_adapter(model.shapes, {}, key=jax.random.key(0))
    assert all(np.any(v) == (".lora_A." in name) for name, v in fresh.items())
    found = logits(model, {**vlm().params, **fresh}, BATCH)
    assert np.array_equal(found, logits(model.without_lora(), vlm().params, BATCH))


def test_merged_equals_unmerged():
    base, adapter = vlm().params, adapter_of(adapted().params)
    before = {name: np.asarray(value) for name, value in base.items()}
    merged = merge_adapter(base, adapter, adapted().model.lora.scale)
    found = logits(vlm().model, merged, BATCH)
    unmerged = logits(adapted().model, adapted().params, BATCH)
    assert_close(found, unmerged, 1e-5)
    assert np.abs(found - logits(vlm().model, base, BATCH)).max() > 0.1, "the adapter does something"
    assert all(np.array_equal(base[name], before[name]) for name in base), "the base stands"


def test_merging_in_bfloat16_rounds_once():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6)), jnp.bfloat16)
    a, b = (np.random.default_rng(i).normal(size=s).astype(np.float32) for i, s in ((1, (2, 6)), (2, (8, 2))))
    merged = merge_adapter(
        {"x.q_proj.weight": w},
        {"x.q_proj.lora_A.weight": jnp.asarray(a), "x.q_proj.lora_B.weight": jnp.asarray(b)},
        0.5,
    )["x.q_proj.weight"]
    assert merged.dtype == jnp.bfloat16
    exact = np.asarray(w, np.float64) + 0.5 * b.astype(np.float64) @ a
    assert np.array_equal(merged, jnp.asarray(exact.astype(np.float32), jnp.bfloat16))


@pytest.mark.parametrize("targets", [("q_proj",), ("v_proj", "down_proj")])
def test_only_the_named_projections_of_the_decoder_carry_one(targets):
    model = Model(vlm().model.config, lora=LoraSpec(rank=3, alpha=3.0, targets=targets))
    added = {name for name in model.shapes if is_adapter(name)}
    expected = {
        f"language_model.layers.{i}.{'mlp' if t == 'down_proj' else 'self_attn'}.{t}.lora_{m}.weight"
        for i in range(2)
        for t in targets
        for m in "AB"
    }
    assert added == expected
    assert set(model.shapes) - added == set(vlm().params)


@pytest.mark.full
def test_every_adapter_tensor_gets_a_gradient():
    """And, with B at zero, A gets none: the update starts in B."""
    model = adapted().model

    @partial(jax.jit, compiler_options=QUICK)
    def of(adapter, base, batch):
        return jax.grad(lambda a: jnp.sum(model.hidden({**base, **a}, batch) ** 3))(adapter)

    def gradients(adapter):
        return of(adapter, vlm().params, BATCH)

    found = gradients(adapter_of(adapted().params))
    assert len(found) == 2 * 2 * 7
    assert all(np.abs(g).max() > 1e-3 for g in found.values())
    fresh = gradients(init_adapter(model.shapes, {}, key=jax.random.key(0)))
    assert all((np.abs(g).max() > 1e-3) == (".lora_B." in name) for name, g in fresh.items())


def test_first_values_depend_on_name_and_key_only():
    def first(targets, key):
        model = Model(vlm().model.config, lora=LoraSpec(rank=2, alpha=2.0, targets=targets))
        return init_adapter(model.shapes, {}, key=jax.random.key(key))

    few, more, other = first(("q_proj",), 0), first(("q_proj", "k_proj"), 0), first(("q_proj",), 1)
    name = "language_model.layers.1.self_attn.q_proj.lora_A.weight"
    assert np.array_equal(few[name], more[name])
    assert not np.array_equal(few[name], other[name])
    assert not np.array_equal(few[name], few[name.replace("layers.1", "layers.0")])


def test_adapters_stay_float32_over_a_bfloat16_base():
    model = Model(vlm().model.config, lora=LoraSpec(rank=2, alpha=2.0), dtype="bfloat16")
    kinds = {is_adapter(name): str(s.dtype) for name, s in model.shapes.items()}
    assert kinds == {True: "float32", False: "bfloat16"}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank >= 1, found 0"),
        ({"alpha": 0.0}, r"alpha > 0, found 0\.0"),
        ({"alpha": float("inf")}, "alpha > 0, found inf"),
        ({"dropout": 1.0}, r"dropout in \[0, 1\), found 1\.0"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
        ({"targets": ()}, r"must be a list of names among q_proj, .*found \(\)"),
        ({"targets": ("q_proj", "lm_head")}, "'lm_head' would match nothing .only the decoder's projections carry"),
        ({"targets": ("embed_tokens",)}, "not embeddings or the output head"),
        ({"targets": ("vision_tower.encoder.layers.0.mlp.fc1",)}, "never the vision tower"),
        ({"targets": ("qproj",)}, r"'qproj' would match nothing \(write q_proj\)"),
        ({"targets": ("qkv_proj", "gate_up_proj")}, r"write q_proj, k_proj, v_proj\); .*write gate_proj, up_proj\)"),
        ({"targets": ("self_attn.o_proj",)}, r"\(write o_proj\)"),
        ({"targets": ("all-linear",)}, "write q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"),
        ({"targets": (r".*self_attn\.(q|v)_proj",)}, r"\(write q_proj, v_proj\)"),
        ({"targets": ("(",)}, "would match nothing$"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_wrong_spec_is_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        LoraSpec(**{"rank": 2, "alpha": 4.0, **wrong})


@pytest.mark.parametrize(("given", "advice"), [("q_proj", "write q_proj"), ("all-linear", "write q_proj, k_proj")])
def test_targets_given_as_one_word_are_not_taken_for_letters(given, advice):
    """As PEFT would accept them; the shape checks are switched off here, as they are outside the tests."""
    wrong = SimpleNamespace(targets=given, rank=2, alpha=4.0, dropout=0.0)
    with pytest.raises(ValueError, match=rf"must be a list of names among .*; found '{given}' \({advice}"):
        LoraSpec.__post_init__(wrong)


def test_dropout_is_no_part_of_what_an_adapter_computes():
    plain, dropped = (Model(vlm().model.config, lora=LoraSpec(2, 2.0, dropout=share)) for share in (0.0, 0.5))
    assert plain.shapes == dropped.shapes
    assert plain.lora.scale == dropped.lora.scale


def test_parameters_of_another_model_are_refused():
    with pytest.raises(ValueError, match="lora_A"):
        vlm().model.bind(adapted().params)
