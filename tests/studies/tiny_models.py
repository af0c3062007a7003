"""Checkpoints of a thousandth of the real size for tests of studies: one layer, 16 wide, with real tokenizers."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
from tiny_tokenizer import family_folder
from transformers import AutoTokenizer, Gemma3Config, Gemma3TextConfig, Qwen2_5_VLConfig

from vlmalign.models.families import read_config
from vlmalign.models.model import Model
from vlmalign.weights.checkpoint import save_params

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip


def checkpoint(folder: Path, chat: Path, config: dict) -> Path:
    """A folder of random weights of this config, with the tokenizer and processor of another."""
    shutil.copytree(chat, folder)
    model = Model(read_config(config))
    save_params(folder, model.init(jax.random.key(0)), model, config)
    return folder


def gemma3_text() -> dict:
    vocab = len(AutoTokenizer.from_pretrained(family_folder("gemma3")))
    return Gemma3TextConfig(**TEXT, vocab_size=vocab, architectures=["Gemma3ForCausalLM"]).to_dict()


def special(folder: Path, *names: str) -> dict[str, int]:
    """How the config calls each token -> its id, as "key=token"."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = (name.split("=") for name in names)
    return {"vocab": len(tokenizer), **{key: tokenizer.convert_tokens_to_ids(token) for key, token in pairs}}


def gemma3_vision(chat: Path) -> dict:
    ids = special(
        chat,
        "boi_token_index=<start_of_image>",
        "eoi_token_index=<end_of_image>",
        "image_token_index=<image_soft_token>",
    )
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": ids.pop("vocab")}, vision_config=vision, mm_tokens_per_image=4, **ids
    )
    return {**config.to_dict(), "architectures": ["Gemma3ForConditionalGeneration"]}


def qwen_vision(chat: Path) -> dict:
    ids = special(
        chat,
        "vision_start_token_id=<|vision_start|>",
        "vision_end_token_id=<|vision_end|>",
        "image_token_id=<|image_pad|>",
    )
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 14,
        "out_hidden_size": 16, "window_size": 56, "fullatt_block_indexes": [0],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config={**text, "vocab_size": ids.pop("vocab")}, vision_config=vision, **ids)
    return {**config.to_dict(), "architectures": ["Qwen2_5_VLForConditionalGeneration"]}
