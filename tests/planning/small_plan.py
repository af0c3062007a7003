"""A study of a tiny Gemma 3 with a tower, SFT then GRPO on films, as the tests of planning plan it."""

import json
from pathlib import Path
from typing import Any

from vlmalign.planning.devices import find_device
from vlmalign.planning.lengths import Given
from vlmalign.planning.study import workloads_of
from vlmalign.planning.workload import Workload
from vlmalign.studies.engine.chain import load_study
from vlmalign.studies.engine.config import StudyConfig

REPOSITORY = Path(__file__).resolve().parents[2]
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
    "stages.base.lora.rank=2",
    "stages.grpo.prompts=2",
    "stages.grpo.rollout.rows=2",
    "stages.grpo.rollout.completion=16",
    "stages.grpo.shapes.rows=2",
    "stages.grpo.shapes.completion_multiple=16",
    "stages.grpo.shapes.prompt_multiple=16",
    "stages.sft.batch=2",
    "stages.sft.shapes.rows=2",
    "stages.sft.shapes.completion_multiple=16",
    "stages.sft.shapes.prompt_multiple=16",
)


def only_workload(config: StudyConfig, model_config: Path | str, *, count: int = 1, **given: int) -> Workload:
    """The study's only workload."""
    device = find_device("a100-80")
    ((workload, _),) = workloads_of(
        config,
        lambda dtype: device,
        count,
        model_configs={"": str(model_config)},
        given=Given(**given),
        compiles=False,
    )
    return workload


def small_workload(folder: Path, *overrides: str, count: int = 1, sizes: dict[str, Any] = SMALL) -> Workload:
    file = folder / "config.json"
    file.write_text(json.dumps(sizes), encoding="utf-8")
    return only_workload(load_study(CONFIG, [*OVERRIDES, *overrides]), file, count=count, prompt=12)


def medgemma(*overrides: str, count: int = 1) -> Workload:
    """The real one, as its config file plans it."""
    return only_workload(load_study(CONFIG, overrides), "medgemma-4b", count=count, prompt=456)
