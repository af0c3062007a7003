"""A GRPO workload of a small Gemma 3 whose matrices outweigh its attention, and its programs compiled here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tiny_checkpoints import QUICK

from vlmalign.planning.batches import places
from vlmalign.planning.devices import THIS, Device
from vlmalign.planning.jobs import Job
from vlmalign.planning.lengths import Given
from vlmalign.planning.programs import lower, options_of
from vlmalign.planning.study import workloads_of
from vlmalign.planning.target import open_target
from vlmalign.planning.workload import Workload
from vlmalign.studies.engine.chain import load_study

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = REPOSITORY / "configs" / "chexreason" / "medgemma_4b.yaml"
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


def grpo_of(model_config: str, prompt: int, *overrides: str) -> Workload:
    """The GRPO of the study of films on this model, prompts of this length."""
    ((workload, _),) = workloads_of(
        load_study(CONFIG, overrides), lambda dtype: HERE, 1, model_configs={"": model_config}, given=Given(prompt=prompt),
        only=["grpo"],
    )  # fmt: skip
    return workload


def workload_of(
    folder: Path, prompt: int, group: int, completion: int, rows: int, *, sizes: dict[str, Any] = LARGE_ENOUGH
) -> Workload:
    """GRPO without rematerialisation in float32, `rows` groups of these lengths, nothing padded."""
    file = folder / "config.json"
    file.write_text(json.dumps(sizes), encoding="utf-8")
    grpo = {
        "objective.beta": 0.0, "prompts": rows, "rollout.rows": rows, "rollout.group": group,
        "rollout.completion": completion, "rollout.top_p": 1.0, "shapes.rows": rows, "shapes.prompt_multiple": 1,
        "shapes.completion_multiple": 1,
    }  # fmt: skip
    base = ("stages.base.remat=none", "stages.base.dtype=float32", "stages.base.lora.rank=2")
    return grpo_of(str(file), prompt, *base, *(f"stages.grpo.{name}={value}" for name, value in grpo.items()))


def compiled_job(workload: Workload, make: Callable[..., Job]) -> jax.stages.Compiled:
    """The GRPO program that `make` describes, compiled for this CPU."""
    target = open_target(HERE, 1)
    job = make(workload.model, workload["grpo"], places(target, workload.model), target)
    return lower(job, target).compile(compiler_options={**QUICK, **options_of(job, target)})
