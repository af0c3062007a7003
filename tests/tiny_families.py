"""A tiny checkpoint of every family that carries adapters, by name, and adapters on them as peft makes them.

`reference(name, tokens)` is transformers' answer; the same tokens are `export.probe`'s, so that the comparison that an
export makes of itself and the comparison with torch share their programs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_checkpoints import Checkpoint, read, text, text_model, vlm, vlm_model, write
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from vlmalign.weights.export import probe

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e6}
QWEN_VISION = {
    "depth": 2, "hidden_size": 24, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 32, "window_size": 56,
    "fullatt_block_indexes": [1],
}  # fmt: skip
#: what PEFT makes of an adapter's settings
KINDS: Mapping[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "both": {"use_rslora": True, "use_dora": True},
}


def _plain(module: PreTrainedModel) -> PreTrainedModel:
    """Weights under which every part of the model shows in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in module.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim < 2:
                # Norms are stored around 1; the last one of both signs, or a tied head would repeat its input.
                last = key in ("model.norm.weight", "model.language_model.norm.weight")
                center, spread = (0.0, 3.0) if last else (float("norm" in key or "ln_q" in key), 0.3)
                value.copy_(center + spread * noise)
            else:
                value.copy_(noise * (0.15 if "embed" in key else 1.3 * float(np.prod(value.shape[1:])) ** -0.5))
    return module.float().eval()


def _llama() -> PreTrainedModel:
    return _plain(LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16, attn_implementation="eager")))


def _qwen2() -> PreTrainedModel:
    config = Qwen2Config(**SIZES, rope_parameters=ROPE, tie_word_embeddings=True, attn_implementation="eager")
    return _plain(Qwen2ForCausalLM(config))


def _qwen2_5_vl() -> PreTrainedModel:
    decoder = {**SIZES, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}}
    config = Qwen2_5_VLConfig(
        text_config=decoder, vision_config=QWEN_VISION, image_token_id=93, video_token_id=94, vision_start_token_id=91,
        vision_end_token_id=92, attn_implementation="eager",
    )  # fmt: skip
    return _plain(Qwen2_5_VLForConditionalGeneration(config))


FRESH = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gemma3 text": text_model,
    "gemma3": vlm_model,
    "qwen2.5-vl": _qwen2_5_vl,
}
#: families with a vision tower -> what its modules are named
TOWERS = {"gemma3": "vision_tower", "qwen2.5-vl": "visual"}


@functools.cache
def family(name: str) -> Checkpoint:
    if name in ("gemma3 text", "gemma3"):
        return text() if name == "gemma3 text" else vlm()
    module = FRESH[name]()
    return read(write(module, name), module)


def torch_logits(module: torch.nn.Module) -> np.ndarray:
    """transformers' or peft's logits on the probe [tokens, vocab]."""
    tokens = torch.from_numpy(probe(96).tokens.astype(np.int64))
    with torch.no_grad():
        return module(input_ids=tokens).logits[0].float().numpy()


def decoder_only(name: str, projections: tuple[str, ...]) -> str | list[str]:
    """`target_modules` for the decoder's projections."""
    return list(projections) if name not in TOWERS else rf".*language_model.*\.({'|'.join(projections)})"


def peft_adapter(name: str, folder: Path, targets: Any, *, seed: int = 0, **settings: Any) -> PeftModel:
    """A model of the family with an adapter that is not zero, as peft wrote it to `folder`."""
    module = get_peft_model(FRESH[name](), LoraConfig(r=3, lora_alpha=5, target_modules=targets, **settings)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in module.named_parameters():
            if "lora_" in key:
                value.add_(0.2 * torch.randn(value.shape, generator=generator))
    module.save_pretrained(folder)
    return module
