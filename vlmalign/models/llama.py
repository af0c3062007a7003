"""Llama 2, 3 and 3.1, Mistral, OpenBioLLM, and Qwen2 / 2.5: plain pre-norm decoders that differ in a few settings.

SiLU gates, RMSNorm without offset, no norms on queries and keys, one rotary base. Qwen2 has biases on q, k and v only;
Mistral a sliding window in every layer; Llama 3.1 stretched wavelengths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmalign.models.config import DecoderConfig, LayerSpec, Llama3Scaling, ModelConfig, Rope

# What config.json leaves out equals the reference implementation's defaults (transformers, configuration_*.py).
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "rope_theta": 10_000.0,
    },
    "mistral": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": 4096, "layer_types": None,
        "rope_theta": 10_000.0,
    },
    "qwen2": {
        "vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "hidden_act": "silu",
        "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "layer_types": None, "rope_theta": 10_000.0,
    },
}  # fmt: skip


def read_rope(text: Mapping[str, Any]) -> Rope:
    """Rotary settings from `rope_parameters`, or from older `rope_theta` with `rope_scaling`.

    A file with both is read as the reference implementation reads it: by its `rope_scaling`.
    """
    settings = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if nested := [key for key, value in settings.items() if isinstance(value, Mapping)]:
        raise ValueError(
            f"config.json: one set of rotary settings was expected, found one each for {', '.join(nested)}"
        )
    if (part := settings.get("partial_rotary_factor", text.get("partial_rotary_factor"))) not in (None, 1):
        raise ValueError(f"config.json: partial_rotary_factor must be 1 here (whole heads turn), found {part!r}")
    theta = float(settings.get("rope_theta", text["rope_theta"]))
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, factor=float(settings["factor"]))
    if kind == "llama3":
        scaling = Llama3Scaling(
            low=float(settings["low_freq_factor"]),
            high=float(settings["high_freq_factor"]),
            original=int(settings["original_max_position_embeddings"]),
        )
        return Rope(theta, factor=float(settings["factor"]), llama3=scaling)
    raise ValueError(f"config.json: rope_type must be default, linear or llama3 here, found {kind!r}")


def read_windows(text: Mapping[str, Any]) -> list[int | None]:
    """The window of each layer: by layer type; else Mistral's everywhere, Qwen2's from layer `max_window_layers` on."""
    count, kind = text["num_hidden_layers"], text["model_type"]
    if kind == "llama":
        return [None] * count
    if kind == "qwen2":
        # A word such as "false" would count as true.
        if text["use_sliding_window"] not in (True, False, None):
            raise ValueError(
                f"config.json: use_sliding_window must be true or false, found {text['use_sliding_window']!r}"
            )
        if not text["use_sliding_window"]:
            return [None] * count
    first = 0 if kind == "mistral" else text["max_window_layers"]
    types = text["layer_types"] or ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    if len(types) != count or not set(types) <= {"sliding_attention", "full_attention"}:
        raise ValueError(f"config.json: layer_types must name {count} layers as full or sliding; found {types}")
    window = text["sliding_window"]
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"config.json: sliding_window must be null or a number of tokens >= 1, found {window!r}")
    return [window if t == "sliding_attention" else None for t in types]


def read_decoder(found: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that a `config.json` of `model_type` llama, mistral or qwen2 describes."""
    kind = found["model_type"]
    text = {**DEFAULTS[kind], **found}
    if text["hidden_act"] != "silu":
        raise ValueError(f"config.json: hidden_act must be silu for {kind} here, found {text['hidden_act']!r}")
    heads = text["num_attention_heads"]
    head_dim = text["head_dim"] or text["hidden_size"] // heads
    rope = read_rope(text)
    attention_bias = text.get("attention_bias", False)
    return DecoderConfig(
        vocab=text["vocab_size"],
        embed=text["hidden_size"],
        ffn=text["intermediate_size"],
        heads=heads,
        kv_heads=text["num_key_value_heads"] or heads,
        head_dim=head_dim,
        layers=tuple(LayerSpec(rope=rope, window=window) for window in read_windows(text)),
        norm_eps=text["rms_norm_eps"],
        norm_offset=0.0,
        sandwich_norm=False,
        qk_norm=False,
        qkv_bias=kind == "qwen2" or attention_bias,
        out_bias=attention_bias,
        ffn_bias=text.get("mlp_bias", False),
        activation="silu",
        query_scale=head_dim**-0.5,
        embed_scale=1.0,
        tied_head=text["tie_word_embeddings"],
    )


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """`config.json` of a text checkpoint of these families."""
    return ModelConfig(family=config["model_type"], decoder=read_decoder(config), vision=None, image_tokens=None)


def parameter_name(name: str, config: ModelConfig) -> str | None:
    """Our name of a checkpoint tensor; None for one that is known and not used."""
    if name == "lm_head.weight":
        return None if config.decoder.tied_head else name
    if name.endswith("rotary_emb.inv_freq"):
        # Written by early Llama exports; the frequencies follow from config.json.
        return None
    return re.sub(r"^model\.", "language_model.", name)


def file_name(name: str, config: ModelConfig) -> str:
    """The checkpoint's name of our parameter."""
    del config
    return re.sub(r"^language_model\.", "model.", name)
