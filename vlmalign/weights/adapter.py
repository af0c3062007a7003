"""PEFT adapter folders in and out: adapter_config.json and adapter_model.safetensors.

Names in the file are `base_model.model.` + the module's path in the `transformers` class + `.lora_A.weight`. On a
vision-language model they must name the language model: keys in the text model's style would load nothing there, and a
list of suffixes such as ["q_proj"] would also hit the vision tower, so a regular expression is written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD, LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.shapes import Array
from vlmalign.weights.checkpoint import SHOWN, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

#: settings of PEFT that change what an adapter computes, with the only values that are understood here
PLAIN = {
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "layers_to_transform": (None,),
    "layer_replication": (None,),
    "lora_bias": (False, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
}


class Adapter(NamedTuple):
    """An adapter as read from a folder."""

    spec: LoraSpec
    params: dict[str, Array]
    base: str | None  #: base_model_name_or_path, as written by whoever made it


def module_prefix(config: ModelConfig) -> str:
    """The path of the decoder inside the `transformers` class: its layers are at `<prefix>layers.0` and so on."""
    return "model." if config.vision is None else "model.language_model."


def save_adapter(folder: Path, adapter: Mapping[str, Array], model: Model, *, base: str) -> None:
    """Write a PEFT folder; `base` is recorded as the model it belongs to. The weights file appears whole or not at all."""
    spec = model.lora
    if spec is None:
        raise ValueError("this model has no adapter; make it with a LoraSpec")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = module_prefix(model.config)
    named = {
        PREFIX + re.sub(r"^language_model\.", prefix, name): np.ascontiguousarray(value)
        for name, value in jax.device_get(dict(adapter)).items()
    }
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": spec.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": spec.rank_stabilised,
        "use_dora": spec.magnitude,
        "target_modules": rf"{re.escape(prefix)}layers\.\d+\.(?:self_attn|mlp)\.(?:{'|'.join(spec.targets)})",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    partial = folder / (WEIGHTS + ".partial")
    save_file(named, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def read_spec(folder: Path, targets: tuple[str, ...]) -> LoraSpec:
    """The adapter's settings. ValueError for a kind of adapter, or a setting, that would compute something else."""
    settings = read_json(folder / CONFIG)
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type must be LORA, found {kind!r}")
    odd = [
        f"{key} = {settings[key]!r}" for key, known in PLAIN.items() if key in settings and settings[key] not in known
    ]
    if odd:
        raise ValueError(
            f"{folder / CONFIG}: not understood here: {', '.join(odd)}; merge the adapter where it was made"
        )
    return LoraSpec(
        rank=settings["r"],
        alpha=settings["lora_alpha"],
        targets=targets,
        rank_stabilised=bool(settings.get("use_rslora")),
        magnitude=bool(settings.get("use_dora")),
    )


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in a PEFT folder, for a model of this config.

    Raises:
        ValueError: naming every unknown, missing and misshaped tensor; when the adapter is another model's, hits modules
            outside the decoder's projections, or is of a kind that would compute something else.
    """
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder} is not a PEFT adapter folder: it has no {WEIGHTS} (pickled adapters are never read)"
        )
    found: dict[str, Any] = load_file(folder / WEIGHTS)
    ours = {_our_name(name, config): (name, value) for name, value in found.items()}
    if None in ours:
        strange = [name for name in found if _our_name(name, config) is None]
        raise ValueError(
            f"{folder / WEIGHTS} is no adapter of this model's decoder: {len(strange)} tensors such as {strange[0]}; "
            f"expected names that begin with {PREFIX}{module_prefix(config)}layers."
        )
    targets = tuple(t for t in ATTENTION_AND_FEED_FORWARD if any(f".{t}.lora_" in name for name in ours))
    spec = read_spec(folder, targets)
    shapes = {name: shape for name, shape in Model(config, lora=spec).shapes.items() if is_adapter(name)}
    problems = [f"missing {name}" for name in shapes if name not in ours]
    problems += [f"unknown {source}" for name, (source, _) in ours.items() if name not in shapes]
    problems += [
        f"{source} is {list(value.shape)}, this model needs {list(shapes[name].shape)}"
        for name, (source, value) in ours.items()
        if name in shapes and value.shape != shapes[name].shape
    ]
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ValueError(f"{folder} does not fit this model: {', '.join(problems[:SHOWN])}{more}")
    params = {name: jnp.asarray(value, jnp.float32) for name, (_, value) in ours.items()}
    return Adapter(spec, params, read_json(folder / CONFIG).get("base_model_name_or_path"))


def _our_name(name: str, config: ModelConfig) -> str | None:
    """Our parameter of a tensor in a PEFT file; None when it is not one of the decoder's."""
    path = name.removeprefix(PREFIX)
    if config.vision is not None:
        # Adapters made with earlier `transformers` name the decoder in the older order.
        path = re.sub(r"^language_model\.model\.", "model.language_model.", path)
    prefix = module_prefix(config)
    if not path.startswith(prefix + "layers."):
        return None
    path = re.sub(r"\.lora_magnitude_vector\.weight$", ".lora_magnitude_vector", path)
    return "language_model." + path.removeprefix(prefix)
