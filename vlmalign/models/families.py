"""The table of model families, by the `model_type` of `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vlmalign.models import gemma3, llama, qwen2_5_vl
from vlmalign.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """What a family must say of itself."""

    read_config: Callable[[Mapping[str, Any]], ModelConfig]
    parameter_name: Callable[[str, ModelConfig], str | None]  #: checkpoint name -> ours (None: known, unused)
    file_name: Callable[[str, ModelConfig], str]  #: ours -> checkpoint name


GEMMA3 = Family(gemma3.read_config, gemma3.parameter_name, gemma3.file_name)

LLAMA = Family(llama.read_config, llama.parameter_name, llama.file_name)

QWEN2_5_VL = Family(qwen2_5_vl.read_config, qwen2_5_vl.parameter_name, qwen2_5_vl.file_name)

FAMILIES = {
    "gemma3": GEMMA3,
    "gemma3_text": GEMMA3,
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen2_5_vl": QWEN2_5_VL,
}


def read_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model described by a parsed `config.json`; ValueError for a `model_type` that is not in the table."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(sorted(FAMILIES))}; config.json says {kind!r}")
    return FAMILIES[kind].read_config(config)
