"""A ChexReason workload of a small Gemma 3 whose matrices outweigh its attention, and its programs compiled here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tiny_checkpoints import QUICK

from vlmalign.config import load_config
from vlmalign.planning.batches import places
from vlmalign.planning.devices import THIS, Device
from vlmalign.planning.inputs import read_lengths, read_model
from vlmalign.planning.jobs import Job
from vlmalign.planning.programs import lower, options_of
from vlmalign.planning.target import open_target
from vlmalign.planning.workload import Workload, read_workload
from vlmalign.studies.chexreason.config import ChexReasonConfig

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "chexreason" / "medgemma_4b.yaml"
MEDGEMMA = REPOSITORY / "tests" / "models" / "full_size" / "medgemma-4b.json"
HERE = Device(THIS, "this", 16 << 30, 1e10, {"float32": 1e11, "bfloat16": 1e11})

#: two layers of 0.98 M numbers each, and a head of 0.26 M
LARGE_ENOUGH: dict[str, Any] = {
    "model_type": "gemma3",
    "image_token_index": 5,
    "boi_token_index": 6,
    "eoi_token_index": 7,
    "mm_tokens_per_image": 4,
    "text_config": {
        "model_type": "gemma3_text",
        "vocab_size": 1021,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    },
}


def workload_of(
    folder: Path, prompt: int, group: int, completion: int, rows: int, *, sizes: dict[str, Any] = LARGE_ENOUGH
) -> Workload:
    """GRPO without rematerialisation in float32, `rows` groups of these lengths, nothing padded."""
    file = folder / "config.json"
    file.write_text(json.dumps(sizes), encoding="utf-8")
    overrides = [
        "model.remat=none", "model.dtype=float32", "model.lora.rank=2", "grpo.beta=0.0", f"grpo.prompts={rows}",
        f"grpo.rollout.rows={rows}", f"grpo.rollout.group={group}", f"grpo.rollout.completion={completion}",
        "grpo.rollout.top_p=1.0", f"grpo.shapes.rows={rows}", "grpo.shapes.prompt_multiple=1",
        "grpo.shapes.completion_multiple=1",
    ]  # fmt: skip
    config = load_config(ChexReasonConfig, CONFIG, overrides)
    model = read_model(config.model, file)
    lengths = read_lengths(config, model, prompt=prompt, answer=None, completion=None)
    return read_workload(config, model, lengths, count=1)


def compiled_job(workload: Workload, make: Callable[..., Job]) -> jax.stages.Compiled:
    """The GRPO program that `make` describes, compiled for this CPU."""
    target = open_target(HERE, 1)
    job = make(workload.model, workload.grpo, places(target, workload.model), target)
    return lower(job, target).compile(compiler_options={**QUICK, **options_of(job, target)})
