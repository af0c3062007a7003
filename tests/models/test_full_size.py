"""The models of the papers at full size, without their memory: parameter counts, tensor names and shapes.

The package holds the config.json of each checkpoint (`planning/known_models`). Our shapes are traced, transformers' model is built on torch's
meta device; neither holds a weight, nothing is compiled.
"""

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from hub_names import hub_name
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from vlmalign.models.config import ModelConfig
from vlmalign.models.families import FAMILIES, read_config
from vlmalign.models.model import Model

FOLDER = Path(__file__).parents[2] / "vlmalign" / "planning" / "known_models"

#: parameters, a tied output head counted once, as the checkpoints' pages and Keras Hub's presets give them
PUBLISHED = {
    "llama-3-8b": 8_030_261_248,
    "medgemma-4b": 4_300_079_472,
    "medgemma-4b-text": 3_880_099_328,
    "medgemma-27b": 27_432_406_640,
    "medgemma-27b-text": 27_009_002_240,
    "openbiollm-8b": 8_030_261_248,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen2.5-vl-7b": 8_292_166_656,
}

#: one literal name per checkpoint, so that the rules above are not the only witness: (hub file, ours, shape)
KNOWN = {
    "medgemma-4b": (
        "vision_tower.vision_model.encoder.layers.26.mlp.fc1.weight",
        "vision_tower.encoder.layers.26.mlp.fc1.weight",
        (4304, 1152),
    ),
    "medgemma-4b-text": (
        "model.layers.33.self_attn.k_proj.weight", "language_model.layers.33.self_attn.k_proj.weight", (1024, 2560),
    ),
    "medgemma-27b": (
        "language_model.model.layers.61.self_attn.q_proj.weight",
        "language_model.layers.61.self_attn.q_proj.weight",
        (4096, 5376),
    ),
    "medgemma-27b-text": (
        "model.layers.61.self_attn.q_norm.weight", "language_model.layers.61.self_attn.q_norm.weight", (128,),
    ),
    "llama-3-8b": ("lm_head.weight", "lm_head.weight", (128_256, 4096)),
    "openbiollm-8b": ("lm_head.weight", "lm_head.weight", (128_256, 4096)),
    "qwen2.5-0.5b": (
        "model.layers.23.self_attn.k_proj.bias", "language_model.layers.23.self_attn.k_proj.bias", (128,),
    ),
    "qwen2.5-7b": ("model.layers.27.mlp.down_proj.weight", "language_model.layers.27.mlp.down_proj.weight", (3584, 18_944)),
    "qwen2.5-vl-3b": ("visual.blocks.31.attn.qkv.weight", "visual.blocks.31.attn.qkv.weight", (3840, 1280)),
    "qwen2.5-vl-7b": ("visual.merger.mlp.2.weight", "visual.merger.mlp.2.weight", (3584, 5120)),
}  # fmt: skip


@functools.cache
def settings(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


@functools.cache
def ours(name: str) -> tuple[ModelConfig, dict[str, tuple[int, ...]]]:
    """The configuration and the shape of every parameter."""
    config = read_config(settings(name))
    return config, {key: value.shape for key, value in Model(config).shapes.items()}


@functools.cache
def theirs(name: str) -> dict[str, tuple[int, ...]]:
    """Tensors of transformers' model by its present names; a tied head, which is no tensor of its own, left out."""
    config = AutoConfig.for_model(**settings(name))
    maker = AutoModelForImageTextToText if "vision_config" in settings(name) else AutoModelForCausalLM
    with torch.device("meta"):
        module = maker.from_config(config)
    return {key: tuple(value.shape) for key, value in module.named_parameters()}


def test_every_config_is_checked():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(PUBLISHED) == set(KNOWN)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_count(name):
    assert sum(map(math.prod, ours(name)[1].values())) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_present_names_and_shapes(name):
    """Every tensor of transformers' model is one of ours under `parameter_name`, and none of ours is left over."""
    config, shapes = ours(name)
    rename = FAMILIES[config.family].parameter_name
    renamed = {present: rename(present, config) for present in theirs(name)}
    assert len(set(renamed.values())) == len(renamed), "two tensors under one name"
    assert {renamed[present]: shape for present, shape in theirs(name).items()} == shapes
    assert (rename("lm_head.weight", config) is None) == config.decoder.tied_head


@pytest.mark.parametrize("name", PUBLISHED)
def test_hub_names_both_ways(name):
    """The hub's files hold exactly the names that `file_name` writes, and `parameter_name` leads back."""
    config, shapes = ours(name)
    family = FAMILIES[config.family]
    hub = {hub_name(present, settings(name)["model_type"]): shape for present, shape in theirs(name).items()}
    assert {family.file_name(key, config): shape for key, shape in shapes.items()} == hub
    assert {family.parameter_name(key, config): shape for key, shape in hub.items()} == shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_known_tensor(name):
    config, shapes = ours(name)
    file, key, shape = KNOWN[name]
    assert FAMILIES[config.family].parameter_name(file, config) == key
    assert FAMILIES[config.family].file_name(key, config) == file
    assert shapes[key] == shape


@pytest.mark.parametrize(
    ("name", "window", "full", "theta", "factor"),
    [
        ("medgemma-4b", 1024, 5, 1e6, 8.0),
        ("medgemma-27b", 1024, 10, 1e6, 8.0),
        ("openbiollm-8b", None, 32, 5e5, 1.0),
        ("qwen2.5-7b", None, 28, 1e6, 1.0),
        ("qwen2.5-vl-3b", None, 36, 1e6, 1.0),
    ],
)
def test_layers(name, window, full, theta, factor):
    """Windows and rotary bases, which shapes do not show."""
    layers = ours(name)[0].decoder.layers
    whole = [spec for spec in layers if spec.window is None]
    assert len(whole) == full
    assert {spec.window for spec in layers} - {None} == ({window} - {None})
    assert {(spec.rope.theta, spec.rope.factor) for spec in whole} == {(theta, factor)}
    local = [spec for spec in layers if spec.window is not None]
    assert {(spec.rope.theta, spec.rope.factor) for spec in local} <= {(1e4, 1.0)}


def test_query_scales_of_medgemma():
    """The 27B divides by sqrt(168) = sqrt(embed / heads), not by sqrt(head_dim)."""
    scales = {name: ours(name)[0].decoder.query_scale for name in ("medgemma-4b", "medgemma-27b", "medgemma-27b-text")}
    assert scales == {"medgemma-4b": 256**-0.5, "medgemma-27b": 168**-0.5, "medgemma-27b-text": 168**-0.5}


def test_tower_and_sections_of_qwen():
    config = ours("qwen2.5-vl-3b")[0]
    assert config.vision.full_blocks == (7, 15, 23, 31)
    assert (config.vision.window, config.vision.slots) == (4, 64)
    assert {spec.rope.sections for spec in config.decoder.layers} == {(16, 24, 24)}
