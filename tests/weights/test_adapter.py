"""PEFT adapters in and out: logits equal peft's (torch, float32) both ways; what would compute something else is refused."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.numpy import load_file, save_file
from tiny_checkpoints import assert_close, group, logits, put, random_adapter, scratch, text, text_model, vlm, vlm_model

from vlmalign.models.lora import LoraSpec, init_adapter, is_adapter, merge_adapter
from vlmalign.models.model import Model
from vlmalign.types import Layout
from vlmalign.weights.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter
from vlmalign.weights.checkpoint import load_params
from vlmalign.weights.export import export_adapter, export_merged

LAYOUT = Layout(24, 0, 0)
TOKENS = np.random.default_rng(5).integers(3, 88, size=20).tolist()
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both": {"use_rslora": True, "use_dora": True},
}
MODELS = {"text": (text, text_model), "vlm": (vlm, vlm_model)}


def peft_logits(module) -> np.ndarray:
    with torch.no_grad():
        return module(input_ids=torch.tensor([TOKENS])).logits[0].numpy()


def ours(model: Model, params) -> np.ndarray:
    images = None if model.config.vision is None else 1
    return np.asarray(logits(model, params, put([group(0, TOKENS)], LAYOUT, images=images)))[0, : len(TOKENS)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", MODELS)
def test_adapter_trained_elsewhere_computes_the_same_here(which, kind, tmp_path):
    base, fresh = MODELS[which]
    targets = r".*language_model.*\.(q_proj|down_proj)" if which == "vlm" else ["q_proj", "down_proj"]
    module = get_peft_model(fresh(), LoraConfig(r=3, lora_alpha=5, target_modules=targets, **KINDS[kind])).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in module.named_parameters():
            if "lora_" in name:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    module.save_pretrained(tmp_path)
    expected = peft_logits(module)

    found = load_adapter(tmp_path, base().model.config)
    assert found.spec.targets == ("q_proj", "down_proj")
    model = Model(base().model.config, lora=found.spec)
    assert np.abs(expected - peft_logits(fresh())).max() > 0.1, "an adapter that changes nothing proves nothing"
    assert_close(ours(model, {**base().params, **found.params}), expected, 1e-5)
    merged = merge_adapter(base().params, found.params, found.spec.scale)
    assert_close(ours(model.without_lora(), merged), expected, 1e-5)


@pytest.mark.parametrize("kind", ["lora", "both"])
@pytest.mark.parametrize("which", MODELS)
def test_our_adapter_loads_in_peft(which, kind, tmp_path):
    base, fresh = MODELS[which]
    settings = KINDS[kind]
    spec = LoraSpec(2, 3.0, rank_stabilised="use_rslora" in settings, magnitude="use_dora" in settings)
    model = Model(base().model.config, lora=spec)
    adapter = random_adapter(model, seed=2)
    gap = export_adapter(tmp_path, model, base().params, adapter, base_path=str(base().folder))
    assert gap <= 1e-5
    module = PeftModel.from_pretrained(fresh(), tmp_path).eval()
    touched = {name.split(".lora_")[0] for name, _ in module.named_parameters() if ".lora_" in name}
    assert len(touched) == 7 * len(base().model.config.decoder.layers)
    assert not any("vision_tower" in name for name in touched)
    assert_close(ours(model, {**base().params, **adapter}), peft_logits(module), 1e-5)


def test_fresh_dora_adapter_changes_nothing():

    model = Model(text().model.config, lora=LoraSpec(2, 3.0, magnitude=True))
    adapter = init_adapter(model.shapes, text().params, key=jax.random.key(0))
    assert_close(ours(model, {**text().params, **adapter}), ours(text().model, text().params), 1e-6)


@pytest.mark.parametrize("shards", ["1GB", "20KB"], ids=["one file", "sharded"])
def test_merged_model_opens_in_transformers(shards, tmp_path):
    source = scratch() / f"merge-{shards}"
    module = vlm_model()
    module.save_pretrained(source, max_shard_size=shards)
    model = Model(vlm().model.config, lora=LoraSpec(2, 3.0, targets=("v_proj", "up_proj")))
    base = load_params(source, model)
    adapter = random_adapter(model, seed=3)
    assert export_merged(tmp_path / "merged", source, model, base, adapter) <= 1e-5
    again = type(module).from_pretrained(tmp_path / "merged").eval()
    assert_close(ours(model, {**base, **adapter}), peft_logits(again), 1e-5)
    assert {f.name for f in (tmp_path / "merged").iterdir()} == {f.name for f in source.iterdir()}
    with pytest.raises(ValueError, match="is not empty"):
        export_merged(tmp_path / "merged", source, model, base, adapter)


@pytest.fixture
def folder(tmp_path):
    """An adapter of `text` that may be spoilt."""
    model = Model(text().model.config, lora=LoraSpec(2, 3.0, targets=("q_proj",)))
    save_adapter(tmp_path, random_adapter(model, seed=1), model, base="somewhere")
    return tmp_path


def spoil(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, found 'IA3'"),
        ({"bias": "all"}, "not understood here: bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"r": 5}, r"is \[2, 32\], this model needs \[5, 32\]"),
    ],
)
def test_settings_that_would_compute_something_else(folder, changes, message):
    spoil(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load_adapter(folder, text().model.config)


def test_adapter_of_another_model_is_named(folder):
    with pytest.raises(ValueError, match=r"no adapter of this model's decoder: .*expected names that begin with"):
        load_adapter(folder, vlm().model.config)


def test_missing_and_unknown_tensors_are_named(folder):
    found = load_file(folder / WEIGHTS)
    dropped = next(name for name in found if "layers.1" in name)
    save_file({name: value for name, value in found.items() if name != dropped}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"missing language_model\.layers\.1"):
        load_adapter(folder, text().model.config)
    save_file({**found, dropped.replace("layers.1", "layers.9"): found[dropped]}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"unknown .*layers\.9"):
        load_adapter(folder, text().model.config)


def test_folder_without_safetensors(folder):
    shutil.move(folder / WEIGHTS, folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="pickled adapters are never read"):
        load_adapter(folder, text().model.config)


def test_written_names_are_all_adapter_parameters(folder):
    names = load_adapter(folder, text().model.config).params
    assert names
    assert all(map(is_adapter, names))
