"""PEFT's adapter_config.json: our settings written into it, and read from it without guessing.

Which modules an adapter is on is read from its tensors, whatever the spelling of `target_modules` (a list, a regular
expression, "all-linear"). Everything else that is set in the file is either understood, known to change nothing about
what the adapter computes, or refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD, LoraSpec
from vlmalign.quoting import quoted, shown

#: read into a LoraSpec, or checked on their own
UNDERSTOOD = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"}

#: whatever they say, the adapter's tensors mean the same (which layers and modules it is on shows in their names)
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size", "eva_config",
    "runtime_config", "ensure_weight_tying",
}  # fmt: skip

#: first values that leave the base as it is; others (pissa, olora, corda, loftq, lora_ga) were trained on a changed base
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

#: of the numbers: an adapter of such a rank would fill the memory
MOST = 1e9

#: "not used", in the ways in which settings say so
UNSET = (None, False, "none", [], {})


def module_prefix(config: ModelConfig) -> str:
    """The path of the decoder inside the `transformers` class: its layers are at `<prefix>layers.0` and so on."""
    return "model." if config.vision is None else "model.language_model."


def settings_of(spec: LoraSpec, config: ModelConfig, *, base: str) -> dict[str, Any]:
    """The contents of adapter_config.json for an adapter on a model of this config; `base` names that model."""
    targets: str | list[str] = list(spec.targets)
    if config.vision is not None:
        # A list of names would hit the projections of the vision tower too.
        within = re.escape(module_prefix(config))
        targets = rf"{within}layers\.\d+\.(?:self_attn|mlp)\.(?:{'|'.join(spec.targets)})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "bias": "none",
        "use_rslora": spec.rank_stabilised,
        "use_dora": spec.magnitude,
        "target_modules": targets,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }


def check_settings(settings: Mapping[str, Any]) -> None:
    """ValueError for a kind of adapter, or a setting, under which its tensors would mean something else."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type must be LORA, found {quoted(settings.get('peft_type'))}")
    odd = [
        f"{shown(key)} = {quoted(value)}"
        for key, value in settings.items()
        if key not in UNDERSTOOD | WITHOUT_EFFECT
        and value not in (PLAIN_STARTS if key == "init_lora_weights" else UNSET)
    ]
    if odd:
        raise ValueError(f"not understood here: {', '.join(odd)}; merge the adapter where it was made")
    for key, kinds in (("r", int), ("lora_alpha", int | float), ("lora_dropout", int | float)):
        value = settings.get(key, 0.0 if key == "lora_dropout" else None)
        if not isinstance(value, kinds) or isinstance(value, bool) or not abs(value) < MOST:
            raise ValueError(f"{key} must be a number, found {quoted(value)}")
    if not isinstance(base := settings.get("base_model_name_or_path"), str | None):
        raise ValueError(f"base_model_name_or_path must be text or null, found {quoted(base)}")
    if isinstance(listed := settings.get("target_modules"), list) and not all(isinstance(name, str) for name in listed):
        raise ValueError(
            "target_modules must be names of modules or a regular expression, found a list of other things"
        )
    for key in ("use_rslora", "use_dora"):
        # A word such as "false" would count as true.
        if settings.get(key) not in (True, False, None):
            raise ValueError(f"{key} must be true or false, found {quoted(settings[key])}")


def read_spec(settings: Mapping[str, Any], targets: tuple[str, ...]) -> LoraSpec:
    """The spec of an adapter with these (checked) settings whose tensors are on `targets`.

    Raises:
        ValueError: when a number is out of range, a projection is named that has no tensors, or one has tensors that is
            not named.
    """
    listed = settings.get("target_modules")
    if isinstance(listed, list) and not settings.get("exclude_modules"):
        without = [t for t in ATTENTION_AND_FEED_FORWARD if t in listed and t not in targets]
        if without:
            raise ValueError(f"target_modules names {', '.join(without)}, for which the weights file has no tensors")
    if isinstance(listed, list):
        unnamed = [t for t in targets if not any(name == t or name.endswith("." + t) for name in listed)]
        if unnamed:
            raise ValueError(
                f"the weights file has tensors for {', '.join(unnamed)}, which target_modules does not name: PEFT would "
                "leave them out; add them to target_modules, or remove the tensors"
            )
    return LoraSpec(
        rank=settings["r"],
        alpha=float(settings["lora_alpha"]),
        targets=targets,
        rank_stabilised=bool(settings.get("use_rslora")),
        magnitude=bool(settings.get("use_dora")),
        dropout=float(settings.get("lora_dropout", 0.0)),
    )
