"""Qwen2.5-VL: a Qwen2 decoder under M-RoPE and a tower for images of any size (arXiv 2502.13923).

A text token turns by (p, p, p). The soft tokens of an image that begins at p turn by (p, p + row, p + column), and the
token after it stands at p + max(rows, columns). Video is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from vlmalign.models.config import DecoderConfig, ImageTokens, LayerSpec, ModelConfig, QwenVisionConfig
from vlmalign.models.llama import read_decoder
from vlmalign.models.qwen_vision import THETA

# What config.json leaves out equals the reference implementation's defaults (transformers, configuration_qwen2_5_vl.py).
TEXT_DEFAULTS = {
    "vocab_size": 152_064, "hidden_size": 8192, "intermediate_size": 29_568, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_window_layers": 80,
    "rope_theta": 1_000_000.0,
}  # fmt: skip
VISION_DEFAULTS = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "num_heads": 16, "in_channels": 3, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112, "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31), "hidden_act": "silu", "rope_parameters": None,
}  # fmt: skip
IMAGE_DEFAULTS = {"image_token_id": 151_655, "vision_start_token_id": 151_652, "vision_end_token_id": 151_653}


def _decoder(text: Mapping[str, Any]) -> DecoderConfig:
    rope = dict(text.get("rope_scaling") or text.get("rope_parameters") or {})
    sections = rope.pop("mrope_section", None)
    if sections is None:
        raise ValueError("config.json of Qwen2.5-VL must give mrope_section in rope_scaling or rope_parameters")
    for key in ("type", "rope_type"):
        # Early files call the kind "mrope"; the frequencies are the plain ones.
        if rope.get(key) == "mrope":
            rope[key] = "default"
    plain = {**text, "model_type": "qwen2", "rope_parameters": rope, "rope_scaling": None}
    decoder = read_decoder({**TEXT_DEFAULTS, **plain})
    if len(sections) != 3 or 2 * sum(sections) != decoder.head_dim:
        raise ValueError(
            f"config.json: mrope_section must be three numbers with sum head_dim / 2 = {decoder.head_dim // 2}, "
            f"found {sections}"
        )
    layers = (LayerSpec(replace(s.rope, sections=tuple(sections)), s.window) for s in decoder.layers)
    return replace(decoder, layers=tuple(layers))


def _vision(found: Mapping[str, Any], embed: int) -> QwenVisionConfig:
    vision = {**VISION_DEFAULTS, **found}
    if vision["hidden_act"] != "silu":
        raise ValueError(f"config.json: vision hidden_act must be silu for Qwen2.5-VL, found {vision['hidden_act']!r}")
    if vision["out_hidden_size"] != embed:
        raise ValueError(
            f"config.json: the tower's out_hidden_size must be the decoder's hidden_size {embed}, "
            f"found {vision['out_hidden_size']}"
        )
    rope = vision["rope_parameters"] or {}
    if rope.get("rope_type", "axial") not in ("axial", "default") or rope.get("rope_theta", THETA) != THETA:
        raise ValueError(f"config.json: the tower turns by rope_type axial with rope_theta {THETA:g}, found {rope}")
    patch, merge = vision["patch_size"], vision["spatial_merge_size"]
    return QwenVisionConfig(
        embed=vision["hidden_size"],
        ffn=vision["intermediate_size"],
        layers=vision["depth"],
        heads=vision["num_heads"],
        patch=patch,
        frames=vision["temporal_patch_size"],
        channels=vision["in_channels"],
        merge=merge,
        window=vision["window_size"] // merge // patch,
        full_blocks=tuple(vision["fullatt_block_indexes"]),
        out=vision["out_hidden_size"],
    )


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """`config.json` of a Qwen2.5-VL checkpoint; hub files keep the decoder's settings at the top level."""
    if not isinstance(config.get("vision_config"), Mapping):
        raise ValueError("config.json of Qwen2.5-VL needs vision_config, found none")
    text = dict(config.get("text_config") or config)
    # Either place may tie the head; neither unties what the other ties.
    text["tie_word_embeddings"] = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
    image = {**IMAGE_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    decoder = _decoder(text)
    return ModelConfig(
        family="qwen2_5_vl",
        decoder=decoder,
        vision=_vision(config["vision_config"], decoder.embed),
        image_tokens=ImageTokens(
            soft=image["image_token_id"],
            begin=image["vision_start_token_id"],
            end=image["vision_end_token_id"],
            bidirectional=False,
        ),
    )


def parameter_name(name: str, config: ModelConfig) -> str | None:
    """Our name of a checkpoint tensor; None for one that is known and not used.

    Hub files write `visual...` and `model.layers...`, newer ones `model.visual...` and `model.language_model...`.
    """
    if name in ("lm_head.weight", "model.lm_head.weight"):
        return None if config.decoder.tied_head else "lm_head.weight"
    name = re.sub(r"^model\.(?=visual\.|language_model\.)", "", name)
    return re.sub(r"^model\.", "language_model.", name)


def file_name(name: str, config: ModelConfig) -> str:
    """The checkpoint's name of our parameter, in the hub's spelling, which `transformers` reads as well."""
    del config
    return re.sub(r"^language_model\.", "model.", name)
