"""Random configurations of every family: a config.json as the hub or as transformers spells it, odd sizes throughout.

Sizes are chosen to catch confusions (head_dim is not embed / heads, one key-value head or as many as heads, an odd
vocabulary, windows shorter and longer than the text). A configuration is a pure function of (family, seed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Json = dict[str, Any]
Rng = np.random.Generator

#: tokens of the longest text that a draw may make; windows are drawn on both sides of it
LONGEST = 80


def pick(rng: Rng, *options: Any) -> Any:
    """One of the options, as it is."""
    return options[int(rng.integers(len(options)))]


def chance(rng: Rng, share: float) -> bool:
    return bool(rng.random() < share)


def between(rng: Rng, low: int, high: int) -> int:
    """A whole number from `low` up to and including `high`."""
    return int(rng.integers(low, high + 1))


def dropped(rng: Rng, config: Json, defaults: Json) -> Json:
    """Without some of the keys that equal their defaults, as hub files leave them out."""
    absent = [key for key, value in defaults.items() if config.get(key, value) == value and chance(rng, 0.5)]
    return {key: value for key, value in config.items() if key not in absent}


def text_sizes(rng: Rng) -> Json:
    """What every decoder has. transformers wants embed to be a multiple of heads; nothing else is."""
    heads = pick(rng, 1, 2, 3, 4, 4, 6, 6)
    return {
        "vocab_size": between(rng, 67, 131),
        "hidden_size": heads * between(rng, -(-20 // heads), 44 // heads),
        "intermediate_size": between(rng, 17, 61),
        "num_hidden_layers": pick(rng, 1, 2, 2, 3, 4),
        "num_attention_heads": heads,
        "num_key_value_heads": pick(rng, *(n for n in range(1, heads + 1) if heads % n == 0)),
        "rms_norm_eps": pick(rng, 1e-6, 1e-5, 1e-3),
    }


def window(rng: Rng) -> int:
    """Mostly shorter than the text; 2 is the shortest that transformers' key-value cache can hold."""
    return pick(rng, 2, 3, between(rng, 4, 9), between(rng, 10, 20), LONGEST)


# ---------------------------------------------------------------- rotary settings


def linear(rng: Rng) -> Json:
    return {"rope_type": "linear", "factor": pick(rng, 2.0, 2.5, 8.0)}


def llama3(rng: Rng) -> Json:
    """Llama 3.1's scaling at a scale at which all its three regimes lie among a few short wavelengths."""
    low = pick(rng, 1.0, 2.0)
    return {
        "rope_type": "llama3",
        "factor": pick(rng, 4.0, 8.0, 32.0),
        "low_freq_factor": low,
        "high_freq_factor": low * pick(rng, 2.0, 4.0),
        "original_max_position_embeddings": pick(rng, 16, 64, 256),
    }


def one_rope(rng: Rng, *, default_theta: float = 10_000.0) -> Json:
    """The rotary keys of a decoder with one rotary base, in the newer spelling or one of the two older ones."""
    scaling = pick(rng, None, linear, llama3)
    scaling = {} if scaling is None else scaling(rng)
    theta = pick(rng, default_theta, 500.0, 500_000.0, 1_000_000.0)
    spelling = pick(rng, "rope_parameters", "rope_scaling", "type")
    if spelling == "rope_parameters":
        return {"rope_parameters": {"rope_type": "default", **scaling, "rope_theta": theta}}
    if spelling == "type" and scaling:
        scaling["type"] = scaling.pop("rope_type")
    return dropped(rng, {"rope_theta": theta, "rope_scaling": scaling or None}, {"rope_theta": default_theta})


def gemma_layers(rng: Rng, count: int) -> Json:
    """Layer kinds and rotary settings, by the hub's pattern, by transformers' lists, or half of each (4.53 to 4.57)."""
    theta, local = pick(rng, 1_000_000.0, 5_000.0), pick(rng, 10_000.0, 300.0)
    scaling = pick(rng, None, linear(rng))
    kinds = {"layer_types": [pick(rng, "sliding_attention", "full_attention") for _ in range(count)]}
    flat = {"rope_theta": theta, "rope_local_base_freq": local, "rope_scaling": scaling}
    spelling = pick(rng, "hub", "between", "newer")
    if spelling == "newer":
        local_scaling = pick(rng, {"rope_type": "default"}, linear(rng))
        full = {**(scaling or {"rope_type": "default"}), "rope_theta": theta}
        return {
            **kinds,
            "rope_parameters": {"full_attention": full, "sliding_attention": {**local_scaling, "rope_theta": local}},
        }
    flat = dropped(rng, flat, {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0, "rope_scaling": None})
    return {**flat, **(kinds if spelling == "between" else {"sliding_window_pattern": between(rng, 1, 4)})}


# ---------------------------------------------------------------- families


def gemma3_text(rng: Rng) -> Json:
    sizes = text_sizes(rng)
    config = {
        "model_type": "gemma3_text",
        **sizes,
        "head_dim": pick(rng, 4, 6, 10, 16),
        "query_pre_attn_scalar": pick(rng, 3, 24, 168, 256),
        "sliding_window": window(rng),
        "attention_bias": chance(rng, 0.4),
        "tie_word_embeddings": chance(rng, 0.6),
        "final_logit_softcapping": pick(rng, None, None, 5.0, 30.0),
        "attn_logit_softcapping": None,
        "hidden_activation": "gelu_pytorch_tanh",
        **gemma_layers(rng, sizes["num_hidden_layers"]),
    }
    defaults = {
        "rms_norm_eps": 1e-6, "query_pre_attn_scalar": 256, "attention_bias": False, "tie_word_embeddings": True,
        "final_logit_softcapping": None, "attn_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh",
    }  # fmt: skip
    return dropped(rng, config, defaults)


def gemma3(rng: Rng) -> Json:
    # transformers' vision-language class does not apply the soft cap of its text part; no checkpoint has one.
    text = {**gemma3_text(rng), "final_logit_softcapping": None}
    heads, side, cell, patch = between(rng, 1, 3), between(rng, 1, 3), between(rng, 1, 2), between(rng, 2, 4)
    vocab = text["vocab_size"]
    config = {
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": dropped(
            rng,
            {
                "model_type": "siglip_vision_model",
                "hidden_size": heads * between(rng, 5, 9),
                "intermediate_size": between(rng, 13, 37),
                "num_hidden_layers": between(rng, 1, 3),
                "num_attention_heads": heads,
                "num_channels": pick(rng, 1, 3),
                "image_size": side * cell * patch,
                "patch_size": patch,
                "layer_norm_eps": pick(rng, 1e-6, 1e-3),
                "vision_use_head": chance(rng, 0.3),
            },
            {"num_channels": 3, "layer_norm_eps": 1e-6, "vision_use_head": True},
        ),
        "mm_tokens_per_image": side**2,
        "boi_token_index": vocab - 3,
        "eoi_token_index": vocab - 2,
        # MedGemma's text-only table ends where this id begins.
        "image_token_index": vocab - 1 if chance(rng, 0.5) else vocab + between(rng, 0, 9),
        "tie_word_embeddings": chance(rng, 0.6),
    }
    return dropped(rng, config, {"tie_word_embeddings": True})


def _plain(rng: Rng, kind: str) -> Json:
    """Sizes, rotary settings and head of Llama, Mistral and Qwen2."""
    sizes = text_sizes(rng)
    derived = sizes["hidden_size"] // sizes["num_attention_heads"]
    config = {"model_type": kind, "hidden_act": "silu", **sizes, "tie_word_embeddings": chance(rng, 0.4)}
    # A rotary embedding needs pairs: only an even size can be left to be worked out.
    if derived % 2 or chance(rng, 0.6):
        config["head_dim"] = pick(rng, 4, 6, 10, 16)
    defaults = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    return dropped(rng, {**config, **one_rope(rng)}, defaults)


def llama(rng: Rng) -> Json:
    config = {**_plain(rng, "llama"), "attention_bias": chance(rng, 0.3), "mlp_bias": chance(rng, 0.3)}
    if config["num_key_value_heads"] == config["num_attention_heads"] and chance(rng, 0.5):
        del config["num_key_value_heads"]  # Llama 1 and 2 files
    return dropped(rng, config, {"attention_bias": False, "mlp_bias": False})


def mistral(rng: Rng) -> Json:
    return {**_plain(rng, "mistral"), "sliding_window": pick(rng, None, window(rng), window(rng))}


def qwen2(rng: Rng) -> Json:
    config = _plain(rng, "qwen2")
    count, used = config["num_hidden_layers"], chance(rng, 0.7)
    # Hub files of models without windows still name one.
    config |= {"use_sliding_window": used, "sliding_window": window(rng), "max_window_layers": between(rng, 0, count)}
    if used and chance(rng, 0.4):
        config["layer_types"] = [pick(rng, "sliding_attention", "full_attention") for _ in range(count)]
    return dropped(rng, config, {"use_sliding_window": False})


def qwen2_5_vl(rng: Rng) -> Json:
    """Text settings at the top level as in hub files, or in `text_config`."""
    heads = pick(rng, 1, 2, 4, 4)
    half = between(rng, 3, 8)  # pairs of a head
    sections = [between(rng, 1, half - 2)]
    sections.append(between(rng, 1, half - 1 - sections[0]))
    sections.append(half - sum(sections))
    text = {**text_sizes(rng), "num_attention_heads": heads, "hidden_size": heads * 2 * half}
    text["num_key_value_heads"] = pick(rng, *(n for n in (1, 2, 4) if heads % n == 0))
    count, used = text["num_hidden_layers"], chance(rng, 0.4)
    text |= {"use_sliding_window": used, "sliding_window": window(rng), "max_window_layers": between(rng, 0, count)}
    text |= {"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    text = dropped(rng, text, {"use_sliding_window": False, "hidden_act": "silu"})
    theta, tied, vocab = pick(rng, 1_000_000.0, 700.0), chance(rng, 0.5), text["vocab_size"]
    tower_heads, patch, merge = between(rng, 1, 3), between(rng, 2, 3), pick(rng, 1, 2, 2)
    depth = between(rng, 1, 3)
    vision = {
        "depth": depth,
        "hidden_size": tower_heads * 4 * between(rng, 1, 3),
        "intermediate_size": between(rng, 13, 37),
        "num_heads": tower_heads,
        "in_channels": pick(rng, 1, 3),
        "patch_size": patch,
        "temporal_patch_size": between(rng, 1, 2),
        "spatial_merge_size": merge,
        "window_size": between(rng, 2, 3) * merge * patch,
        "fullatt_block_indexes": [i for i in range(depth) if chance(rng, 0.5)],
        "out_hidden_size": text["hidden_size"],
    }
    vision = dropped(rng, vision, {"in_channels": 3, "temporal_patch_size": 2, "spatial_merge_size": 2})
    config = {
        "model_type": "qwen2_5_vl",
        "vision_config": vision,
        "vision_start_token_id": vocab - 4,
        "vision_end_token_id": vocab - 3,
        "image_token_id": vocab - 2,
        "video_token_id": vocab - 1,
        "tie_word_embeddings": tied,
    }
    if chance(rng, 0.5):
        rope = {"type": "mrope", "mrope_section": sections}
        return {**config, **dropped(rng, {**text, "rope_theta": theta}, {"rope_theta": 1e6}), "rope_scaling": rope}
    rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": theta}
    return {**config, "text_config": {"model_type": "qwen2_5_vl_text", **text, "rope_parameters": rope}}


#: family -> draw of its config.json
CONFIGURATIONS: dict[str, Callable[[Rng], Json]] = {
    "gemma3_text": gemma3_text,
    "gemma3": gemma3,
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen2_5_vl": qwen2_5_vl,
}


def generator(family: str, seed: int, purpose: str) -> Rng:
    """Random numbers of their own for each (family, seed, purpose)."""
    return np.random.default_rng([seed, *f"{family} {purpose}".encode()])


def draw(family: str, seed: int) -> Json:
    """The config.json of this family and seed."""
    return CONFIGURATIONS[family](generator(family, seed, "configuration"))
