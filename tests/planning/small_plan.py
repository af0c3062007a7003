"""A ChexReason run of a tiny Gemma 3 with a tower, as the tests of planning plan it."""

import json
from pathlib import Path
from typing import Any

from vlmalign.config import load_config
from vlmalign.planning.inputs import read_lengths, read_model
from vlmalign.planning.workload import Workload, read_workload
from vlmalign.studies.chexreason.config import ChexReasonConfig

REPOSITORY = Path(__file__).resolve().parents[2]
MEDGEMMA = REPOSITORY / "tests" / "models" / "full_size" / "medgemma-4b.json"
CONFIG = REPOSITORY / "configs" / "chexreason" / "medgemma_4b.yaml"

SMALL: dict[str, Any] = {
    "model_type": "gemma3",
    "image_token_index": 5,
    "boi_token_index": 6,
    "eoi_token_index": 7,
    "mm_tokens_per_image": 4,
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
#: two prompts of four completions of 16 tokens
OVERRIDES = (
    "model.lora.rank=2",
    "grpo.prompts=2",
    "grpo.rollout.rows=2",
    "grpo.rollout.completion=16",
    "grpo.shapes.rows=2",
    "grpo.shapes.completion_multiple=16",
    "grpo.shapes.prompt_multiple=16",
    "sft.batch=2",
    "sft.shapes.rows=2",
    "sft.shapes.completion_multiple=16",
    "sft.shapes.prompt_multiple=16",
)


def config_of(*overrides: str) -> ChexReasonConfig:
    return load_config(ChexReasonConfig, CONFIG, [*OVERRIDES, *overrides])


def small_workload(folder: Path, *overrides: str, count: int = 1, sizes: dict[str, Any] = SMALL) -> Workload:
    file = folder / "config.json"
    file.write_text(json.dumps(sizes), encoding="utf-8")
    config = config_of(*overrides)
    model = read_model(config.model, file)
    lengths = read_lengths(config, model, prompt=12, answer=None, completion=None)
    return read_workload(config, model, lengths, count=count)


def medgemma(*overrides: str, count: int = 1) -> Workload:
    """The real one, as its config file plans it."""
    config = load_config(ChexReasonConfig, CONFIG, overrides)
    model = read_model(config.model, MEDGEMMA)
    return read_workload(
        config, model, read_lengths(config, model, prompt=456, answer=None, completion=None), count=count
    )
