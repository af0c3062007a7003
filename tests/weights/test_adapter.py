"""PEFT adapters in and out: logits and gradients equal peft's (torch, float32); what would compute something else is refused."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import QUICK, assert_close, random_adapter
from tiny_families import FRESH, KINDS, TOWERS, decoder_only, family, peft_adapter, torch_logits

from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD, LoraSpec, init_adapter, is_adapter, merge_adapter
from vlmalign.models.model import Model
from vlmalign.weights.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from vlmalign.weights.export import export_adapter, probe, probe_logits

TWO = ("q_proj", "down_proj")


def merged_logits(name: str, found) -> np.ndarray:
    """Ours, with the adapter merged: one program per family, whatever the adapter."""
    base = family(name)
    return probe_logits(base.model, merge_adapter(base.params, found.params, found.spec.scale))


# ---------------------------------------------------------------- from peft


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FRESH)
def test_adapter_trained_elsewhere_computes_the_same_here(name, kind, tmp_path):
    module = peft_adapter(name, tmp_path, decoder_only(name, TWO), lora_dropout=0.1, **KINDS[kind])
    expected = torch_logits(module)
    assert np.abs(expected - torch_logits(family(name).torch)).max() > 0.1, "an adapter that changes nothing"
    found = load_adapter(tmp_path, family(name).model.config)
    assert found.spec == LoraSpec(3, 5.0, TWO, "use_rslora" in KINDS[kind], "use_dora" in KINDS[kind], dropout=0.1)
    assert_close(merged_logits(name, found), expected, 1e-5)


def test_gradients_of_a_loaded_adapter_are_those_of_peft(tmp_path):
    """So training goes on from it as it would have there; with DoRA, whose norm both hold constant."""
    name, layers = "gemma3", len(family("gemma3").model.config.decoder.layers)
    module = peft_adapter(name, tmp_path, decoder_only(name, TWO), **KINDS["both"])
    found = load_adapter(tmp_path, family(name).model.config)
    model = Model(family(name).model.config, lora=found.spec)
    batch = probe(96)
    weight = np.random.default_rng(0).normal(size=(batch.tokens.shape[1], 96)).astype(np.float32)

    @partial(jax.jit, compiler_options=QUICK)
    def gradient(adapter, base, batch):
        def loss(adapter):
            params = {**base, **adapter}
            return jnp.mean(weight * (model.hidden(params, batch)[0] @ model.head(params).T))

        return jax.grad(loss)(adapter)

    ours = gradient(found.params, family(name).params, batch)
    logits = module(input_ids=torch.from_numpy(batch.tokens.astype(np.int64))).logits[0]
    (torch.from_numpy(weight) * logits).mean().backward()
    theirs = {
        key.removeprefix("base_model.model.model.").replace(".default", "").replace("vector.weight", "vector"): value
        for key, value in module.named_parameters()
        if "lora_" in key
    }
    assert theirs.keys() == ours.keys()
    assert len(ours) == layers * 2 * 3
    for key, value in theirs.items():
        assert np.abs(value.grad.numpy()).max() > 1e-4, key
        assert_close(ours[key], value.grad.numpy(), 1e-5, key)


SPELLINGS = {
    "as written": lambda key: key,
    "raw state dict": lambda key: key.replace(".weight", ".default.weight").replace("vector", "vector.default"),
    "module of the vector": lambda key: key.replace("magnitude_vector", "magnitude_vector.weight"),
    "no prefix": lambda key: key.removeprefix("base_model.model."),
    "earlier order": lambda key: key.replace("model.language_model.", "language_model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_names(spelling, tmp_path, caplog):
    peft_adapter("gemma3", tmp_path, decoder_only("gemma3", TWO), use_dora=True)
    expected = load_adapter(tmp_path, family("gemma3").model.config)
    stored = load_file(tmp_path / WEIGHTS)
    save_file({SPELLINGS[spelling](key): value for key, value in stored.items()}, tmp_path / WEIGHTS)
    with caplog.at_level(logging.WARNING):
        found = load_adapter(tmp_path, family("gemma3").model.config)
    assert found.spec == expected.spec
    assert found.params.keys() == expected.params.keys()
    assert all(np.array_equal(found.params[key], expected.params[key]) for key in found.params)
    assert ("earlier transformers" in caplog.text) == (spelling == "earlier order")


def test_text_names_are_an_earlier_spelling_of_qwen2_5_vl(tmp_path, caplog):
    """transformers had that decoder at `model.layers` once; peft itself would load nothing from such a file."""
    peft_adapter("qwen2.5-vl", tmp_path, decoder_only("qwen2.5-vl", TWO))
    config = family("qwen2.5-vl").model.config
    expected = load_adapter(tmp_path, config).params
    stored = load_file(tmp_path / WEIGHTS)
    save_file({key.replace("language_model.", ""): value for key, value in stored.items()}, tmp_path / WEIGHTS)
    with caplog.at_level(logging.WARNING):
        found = load_adapter(tmp_path, config).params
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert "read as model.language_model.layers" in caplog.text


def test_all_linear_on_a_text_model(tmp_path):
    module = peft_adapter("llama", tmp_path, "all-linear")
    found = load_adapter(tmp_path, family("llama").model.config)
    assert found.spec.targets == ATTENTION_AND_FEED_FORWARD
    assert_close(merged_logits("llama", found), torch_logits(module), 1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]], ids=["all-linear", "list"])
@pytest.mark.parametrize("name", TOWERS)
def test_an_adapter_on_the_tower_is_refused(name, targets, tmp_path):
    """Both of PEFT's short spellings hit the tower's projections too (a list, where it has projections of that name)."""
    peft_adapter(name, tmp_path, targets)
    with pytest.raises(ValueError, match=rf"such as \S*{TOWERS[name]}\S*, which are on the vision tower"):
        load_adapter(tmp_path, family(name).model.config)


@pytest.mark.parametrize(
    ("targets", "settings", "said"),
    [
        (
            list(TWO),
            {"layers_to_transform": [0, 2]},
            "q_proj in layers 0, 2, not in 1; down_proj in layers 0, 2, not in 1",
        ),
        (list(TWO), {"layers_to_transform": [1], "layers_pattern": "layers"}, "q_proj in layers 1, not in 0, 2"),
        (
            r".*\.(q_proj|layers\.[12]\.mlp\.up_proj)",
            {},
            r"3 layers: up_proj in layers 1-2, not in 0\. Here an adapter",
        ),
    ],
    ids=["layers_to_transform", "layers_pattern", "regular expression"],
)
def test_an_adapter_on_some_layers_is_refused(targets, settings, said, tmp_path):
    peft_adapter("gemma3 text", tmp_path, targets, **settings)
    with pytest.raises(ValueError, match=said):
        load_adapter(tmp_path, family("gemma3 text").model.config)


def test_layers_that_are_all_of_them_are_no_matter(tmp_path):
    peft_adapter("gemma3 text", tmp_path, list(TWO), layers_to_transform=[0, 1, 2])
    assert load_adapter(tmp_path, family("gemma3 text").model.config).spec.targets == TWO


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": {"q_proj": 5}}, r"rank_pattern = \{'q_proj': 5\}; merge the adapter where it was made"),
        ({"alpha_pattern": {"q_proj": 9}}, r"alpha_pattern = \{'q_proj': 9\}"),
        ({"bias": "lora_only"}, "bias = 'lora_only'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
    ],
)
def test_what_peft_can_and_we_do_not_is_refused(settings, said, tmp_path):
    peft_adapter("qwen2", tmp_path, list(TWO), **settings)
    with pytest.raises(ValueError, match=said):
        load_adapter(tmp_path, family("qwen2").model.config)


# ---------------------------------------------------------------- to peft


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "rslora"), ("qwen2", "lora"), ("gemma3 text", "dora"), ("gemma3", "both"), ("qwen2.5-vl", "lora")],
)
def test_our_adapter_loads_in_peft(name, kind, tmp_path):
    base = family(name)
    spec = LoraSpec(
        2, 3.0, rank_stabilised="rs" in kind or kind == "both", magnitude=kind in ("dora", "both"), dropout=0.2
    )
    model = Model(base.model.config, lora=spec)
    adapter = random_adapter(model, seed=2)
    done = export_adapter(tmp_path / "peft", model, base.params, adapter, base_path=str(base.folder))
    assert done.gap <= 1e-5
    assert done.effect > 0.1
    assert set(done.files) == {CONFIG, WEIGHTS}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=r"(?i).*(missing|unexpected).*key.*")
        module = PeftModel.from_pretrained(FRESH[name](), tmp_path / "peft").eval()
    assert module.peft_config["default"].lora_dropout == 0.2
    touched = {key.split(".lora_")[0] for key, _ in module.named_parameters() if ".lora_" in key}
    assert len(touched) == 7 * len(base.model.config.decoder.layers)
    inside = "language_model.layers." if name in TOWERS else "model.layers."
    assert all(inside in key for key in touched)
    assert_close(probe_logits(model, {**base.params, **adapter}), torch_logits(module), 1e-5)


@pytest.mark.full
def test_fresh_dora_adapter_changes_nothing(optimised):
    """Not bit for bit: a column's length is divided by itself."""
    base = family("gemma3 text")
    model = Model(base.model.config, lora=LoraSpec(2, 3.0, magnitude=True))
    adapter = init_adapter(model.shapes, base.params, key=jax.random.key(0))
    assert_close(probe_logits(model, {**base.params, **adapter}), probe_logits(base.model, base.params), 1e-6)


def test_only_this_models_adapter_is_written(tmp_path):
    model = Model(family("llama").model.config, lora=LoraSpec(2, 3.0))
    adapter = random_adapter(model, seed=0)
    lost = adapter.pop("language_model.layers.1.mlp.up_proj.lora_A.weight")
    with pytest.raises(ValueError, match=r"1 missing, 0 unknown, such as language_model\.layers\.1\.mlp\.up_proj"):
        save_adapter(tmp_path / "new", adapter, model, base="somewhere")
    assert lost.size
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- folders that do not fit


@pytest.fixture
def folder(tmp_path):
    """An adapter of `gemma3 text` that may be spoilt."""
    model = Model(family("gemma3 text").model.config, lora=LoraSpec(2, 3.0, targets=("q_proj",)))
    save_adapter(tmp_path, random_adapter(model, seed=1), model, base="somewhere")
    return tmp_path


def load(folder, name="gemma3 text"):
    return load_adapter(folder, family(name).model.config)


def spoil(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite(folder, change):
    stored = load_file(folder / WEIGHTS)
    save_file(change(dict(stored)), folder / WEIGHTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, found 'IA3'"),
        ({"bias": "all"}, "not understood here: bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"of_the_future": True}, "of_the_future = True"),
        ({"r": 5}, r"is \[2, 32\], this model needs \[5, 32\]"),
        ({"r": None}, "r must be a number, found None"),
        ({"r": 2.0}, r"r must be a number, found 2\.0"),
        ({"lora_alpha": "16"}, "lora_alpha must be a number, found '16'"),
        ({"lora_dropout": 1.5}, r"dropout in \[0, 1\), found 1\.5"),
        ({"use_dora": True}, r"missing language_model\.layers\.0\.self_attn\.q_proj\.lora_magnitude_vector"),
        ({"target_modules": ["q_proj", "up_proj"]}, "target_modules names up_proj, for which .* no tensors"),
    ],
)
def test_settings_that_would_compute_something_else(folder, changes, message):
    spoil(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_settings_without_effect_are_no_matter(folder):
    before = load(folder)
    spoil(
        folder, arrow_config=None, use_bdlora=None, rank_pattern={}, modules_to_save=[], of_the_future=False,
        peft_version="9.0", init_lora_weights="gaussian", revision="main", task_type=None,
    )  # fmt: skip
    assert load(folder).spec == before.spec


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma3", "as a text model's adapter has; expected names that begin with .*model.language_model.layers"),
        ("llama", "is on layers up to 2, this model has 2 layers"),
    ],
)
def test_adapter_of_another_model_is_named(folder, name, said):
    with pytest.raises(ValueError, match=said):
        load(folder, name)


def test_adapter_of_a_vision_language_model_on_a_text_model(tmp_path):
    peft_adapter("gemma3", tmp_path, decoder_only("gemma3", TWO))
    with pytest.raises(ValueError, match=r"as a vision-language model's adapter has; .* this is a text model"):
        load(tmp_path)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {k: v for k, v in t.items() if k != FIRST}, r"missing language_model\.layers\.0\S*lora_A"),
        (
            lambda t: {**t, FIRST.replace("layers.0", "layers.9"): t[FIRST]},
            "is on layers up to 9, this model has 3 layers",
        ),
        (lambda t: {**t, FIRST.replace("q_proj", "qkv_proj"): t[FIRST]}, r"unknown \S*qkv_proj"),
        (lambda t: {k.replace("q_proj", "qkv_proj"): v for k, v in t.items()}, "is on none of q_proj"),
        (lambda t: {**t, FIRST.replace("A.w", "A.default.w"): t[FIRST]}, r"holds \S*lora_A\.weight twice"),
        (
            lambda t: {**t, "base_model.model.lm_head.lora_A.weight": t[FIRST]},
            "1 of 7 .* on the embeddings or the output",
        ),
        (lambda t: {**t, FIRST: t[FIRST].T.copy()}, r"is \[32, 2\], this model needs \[2, 32\]"),
        (lambda t: {**t, FIRST: t[FIRST].astype(np.int8)}, r"is of int8"),
        (lambda t: {}, "holds no tensors"),
    ],
    ids=["missing", "layer", "one unknown", "all unknown", "doubled", "head", "transposed", "dtype", "empty"],
)
def test_tensors_that_do_not_fit(folder, change, said):
    rewrite(folder, change)
    with pytest.raises(ValueError, match=said):
        load(folder)


def test_adapters_in_bfloat16_become_float32(folder):
    before = load(folder).params
    rewrite(folder, lambda t: {k: v.astype(ml_dtypes.bfloat16) for k, v in t.items()})
    found = load(folder).params
    assert {value.dtype.name for value in found.values()} == {"float32"}
    assert all(np.array_equal(found[k], before[k].astype(jnp.bfloat16)) for k in before)


def test_folder_without_safetensors(folder):
    shutil.move(folder / WEIGHTS, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapters are never read"):
        load(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_adapter_of_a_run_that_diverged(folder, value):
    def diverge(tensors):
        name = sorted(tensors)[3]
        return {**tensors, name: np.full_like(tensors[name], value)}

    rewrite(folder, diverge)
    with pytest.raises(ValueError, match=r"holds NaN or infinite numbers, as of a run that diverged: \S+lora_"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_rslora": "false"}, "use_rslora must be true or false, found 'false'"),
        ({"use_dora": "no"}, "use_dora must be true or false"),
        ({"target_modules": ["mlp.up_proj"]}, "has tensors for q_proj, which target_modules does not name"),
    ],
)
def test_settings_that_say_another_thing_than_they_seem(folder, changes, said):
    """A word for false would count as true; PEFT applies no tensors of a projection that is not named."""
    spoil(folder, target_modules=["self_attn.q_proj"], use_rslora=False, use_dora=None)
    load(folder)
    spoil(folder, **changes)
    with pytest.raises(ValueError, match=said):
        load(folder)


def test_a_truncated_file(folder):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:-20])
    with pytest.raises(ValueError, match=rf"{WEIGHTS} is not a whole safetensors file"):
        load(folder)


def test_written_names_are_all_adapter_parameters(folder):
    names = load(folder).params
    assert names
    assert all(map(is_adapter, names))
