"""Gemma 3 and MedGemma: what differs from other families, and nothing else.

Text: (1 + w) RMSNorm, sandwich norms, norms on queries and keys, tanh-GELU gates, embeddings scaled by sqrt(d), five
local layers (own rotary base, sliding window) per global layer, tied head. Images: a SigLIP tower, 4 x 4 average
pooling to `mm_tokens_per_image` soft tokens that see each other in both directions (Gemma 3 report, arXiv 2503.19786).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmalign.models.config import DecoderConfig, ImageTokens, LayerSpec, ModelConfig, Rope, SiglipConfig

# Hub files leave out what equals the reference implementation's defaults (transformers, configuration_gemma3.py).
TEXT_DEFAULTS = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}
VISION_DEFAULTS = {
    "model_type": "siglip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
IMAGE_DEFAULTS = {
    "mm_tokens_per_image": 256,
    "boi_token_index": 255_999,
    "eoi_token_index": 256_000,
    "image_token_index": 262_144,
}


def _rope(kind: str, settings: Mapping[str, Any], theta: float) -> Rope:
    """One layer kind's rotary settings, from a `rope_parameters` entry or an older `rope_scaling`."""
    rope_type = settings.get("rope_type", settings.get("type", "default"))
    if rope_type not in ("default", "linear"):
        raise ValueError(f"{kind}: rope_type must be default or linear for Gemma 3, found {rope_type!r}")
    factor = float(settings["factor"]) if rope_type == "linear" else 1.0
    return Rope(theta=float(settings.get("rope_theta", theta)), factor=factor)


def _layers(text: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    newer = text.get("rope_parameters") or {}
    # Where a file has both, the older one is laid over, as in the reference implementation.
    full = {**(newer.get("full_attention") or {}), **(text.get("rope_scaling") or {})}
    ropes = {
        "full_attention": _rope("full_attention", full, text["rope_theta"]),
        "sliding_attention": _rope(
            "sliding_attention", newer.get("sliding_attention") or {}, text["rope_local_base_freq"]
        ),
    }
    pattern, count = text["sliding_window_pattern"], text["num_hidden_layers"]
    kinds = text.get("layer_types") or [
        "sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)
    ]
    if len(kinds) != count or not set(kinds) <= set(ropes):
        raise ValueError(f"layer_types must name {count} layers as {' or '.join(ropes)}; found {kinds}")
    window = text["sliding_window"]
    if "sliding_attention" in kinds and (type(window) is not int or window < 1):
        raise ValueError(f"config.json: sliding_window must be a number of tokens >= 1, found {window!r}")
    return tuple(LayerSpec(rope=ropes[kind], window=window if kind == "sliding_attention" else None) for kind in kinds)


def _decoder(found: Mapping[str, Any]) -> DecoderConfig:
    text = {**TEXT_DEFAULTS, **found}
    text["use_bidirectional_attention"] = text["use_bidirectional_attention"] or False
    for key, only in (
        ("attn_logit_softcapping", None),
        ("use_bidirectional_attention", False),
        ("hidden_activation", "gelu_pytorch_tanh"),
    ):
        if text[key] != only:
            raise ValueError(f"config.json: {key} must be {only!r} for Gemma 3 here, found {text[key]!r}")
    return DecoderConfig(
        vocab=text["vocab_size"],
        embed=text["hidden_size"],
        ffn=text["intermediate_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        head_dim=text["head_dim"],
        layers=_layers(text),
        norm_eps=text["rms_norm_eps"],
        norm_offset=1.0,
        sandwich_norm=True,
        qk_norm=True,
        qkv_bias=text["attention_bias"],
        out_bias=text["attention_bias"],
        ffn_bias=False,
        activation="gelu_tanh",
        query_scale=text["query_pre_attn_scalar"] ** -0.5,
        embed_scale=text["hidden_size"] ** 0.5,
        tied_head=text["tie_word_embeddings"],
        logit_softcap=text["final_logit_softcapping"],
    )


def _vision(found: Mapping[str, Any], tokens: int) -> SiglipConfig:
    vision = {**VISION_DEFAULTS, **found}
    if vision["model_type"] != "siglip_vision_model":
        raise ValueError(f"config.json: the vision part must be a siglip_vision_model, found {vision['model_type']!r}")
    if vision["hidden_act"] != "gelu_pytorch_tanh":
        raise ValueError(f"config.json: vision hidden_act must be gelu_pytorch_tanh, found {vision['hidden_act']!r}")
    config = SiglipConfig(
        embed=vision["hidden_size"],
        ffn=vision["intermediate_size"],
        layers=vision["num_hidden_layers"],
        heads=vision["num_attention_heads"],
        image_size=vision["image_size"],
        patch=vision["patch_size"],
        channels=vision["num_channels"],
        norm_eps=vision["layer_norm_eps"],
        tokens=tokens,
        has_pooling_head=vision["vision_use_head"],
    )
    side = round(tokens**0.5)
    if side * side != tokens or config.grid % side:
        raise ValueError(
            f"mm_tokens_per_image must be a square whose side divides the {config.grid} patches per side; found {tokens}"
        )
    return config


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """`config.json` of a Gemma 3 text or vision-language checkpoint, in old and new spellings."""
    if config["model_type"] == "gemma3_text":
        return ModelConfig(family="gemma3", decoder=_decoder(config), vision=None, image_tokens=None)
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), Mapping):
            raise ValueError(f"config.json of a Gemma 3 vision-language model needs {part}, found none")
    image = {**IMAGE_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
    # The top-level setting decides; the text part of the same file may say otherwise, as its own default.
    text = {**config["text_config"], "tie_word_embeddings": config.get("tie_word_embeddings", True)}
    if text.get("final_logit_softcapping") is not None:
        raise ValueError(
            "config.json: final_logit_softcapping must be null for a Gemma 3 vision-language model, found "
            f"{text['final_logit_softcapping']!r}: the reference implementation leaves such a cap out there"
        )
    return ModelConfig(
        family="gemma3",
        decoder=_decoder(text),
        vision=_vision(config["vision_config"], image["mm_tokens_per_image"]),
        image_tokens=ImageTokens(
            soft=image["image_token_index"],
            begin=image["boi_token_index"],
            end=image["eoi_token_index"],
            bidirectional=True,
        ),
    )


def parameter_name(name: str, config: ModelConfig) -> str | None:
    """Our name of a checkpoint tensor; None for one that is known and not used.

    Three generations write the same tensors as `language_model.model.layers...` with
    `vision_tower.vision_model...`, as `model.language_model.layers...`, and as `language_model.model.layers...`
    with `vision_tower.encoder...`; text-only checkpoints as `model.layers...`.
    """
    if name in ("lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"):
        # Written by some tools although it is the embedding table again.
        return None if config.decoder.tied_head else "lm_head.weight"
    if config.vision is None:
        return re.sub(r"^model\.", "language_model.", name)
    name = re.sub(r"^model\.(?=language_model|vision_tower|multi_modal_projector)", "", name)
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)
    if config.vision.has_pooling_head and name.startswith("vision_tower.head."):
        return None
    return name


def file_name(name: str, config: ModelConfig) -> str:
    """The checkpoint's name of our parameter, in the spelling that both hub files and `transformers` read."""
    if config.vision is None:
        return re.sub(r"^language_model\.", "model.", name)
    name = re.sub(r"^language_model\.", "language_model.model.", name)
    return re.sub(r"^vision_tower\.", "vision_tower.vision_model.", name)
