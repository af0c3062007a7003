"""PEFT adapter folders in and out: adapter_config.json and adapter_model.safetensors, every tensor accounted for.

Names in the file are `base_model.model.` + the module's path in the `transformers` class + `.lora_A.weight`. An adapter
is on every decoder layer, on the same projections in each; one that is elsewhere is refused, with what it is on.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from vlmalign.models.config import ModelConfig
from vlmalign.models.lora import ATTENTION_AND_FEED_FORWARD, MAGNITUDE, LoraSpec, is_adapter
from vlmalign.models.model import Model
from vlmalign.quoting import shown
from vlmalign.shapes import Array
from vlmalign.weights.layout import SHOWN, read_json
from vlmalign.weights.new_folder import new_folder
from vlmalign.weights.peft_config import check_settings, module_prefix, read_spec, settings_of

log = logging.getLogger(__name__)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

#: where earlier `transformers` had the decoder of a vision-language model, by family
EARLIER_PREFIX = {"gemma3": "language_model.model.", "qwen2_5_vl": "model."}

#: a tensor's place: path of the module, which part, and the adapter's name where a raw state dict still carries it
TENSOR = re.compile(
    rf"(?:{re.escape(PREFIX)})?(?P<module>.+)\.lora_"
    r"(?:(?P<matrix>[AB])(?:\.[^.]+)?\.weight|magnitude_vector(?:\.(?!weight$)[^.]+)?(?:\.weight)?)"
)

#: modules that carry no adapter here, and what to call them
ELSEWHERE = (
    (
        re.compile(r"\b(?:vision_tower|visual|vision_model|multi_modal_projector)\b"),
        "the vision tower or its projector",
    ),
    (re.compile(r"\b(?:lm_head|embed_tokens)\b"), "the embeddings or the output head"),
)


class Adapter(NamedTuple):
    """An adapter as read from a folder."""

    spec: LoraSpec
    params: dict[str, Array]  #: float32, ready to be trained on
    base: str | None  #: base_model_name_or_path, as written by whoever made it


def save_adapter(folder: Path, adapter: Mapping[str, Array], model: Model, *, base: str) -> None:
    """Write a PEFT folder, whole or not at all; `base` is recorded as the model it belongs to.

    Raises:
        ValueError: when `folder` is not empty, or `adapter` is not exactly this model's.
    """
    if model.lora is None:
        raise ValueError("this model has no adapter; make it with a LoraSpec")
    needed = {name for name in model.shapes if is_adapter(name)}
    if needed != adapter.keys():
        raise ValueError(
            f"the tensors are not this model's adapter: {len(needed - adapter.keys())} missing, "
            f"{len(adapter.keys() - needed)} unknown, such as {min(needed ^ adapter.keys())}"
        )
    prefix = PREFIX + module_prefix(model.config)
    named = {
        prefix + name.removeprefix("language_model."): np.ascontiguousarray(value)
        for name, value in jax.device_get(dict(adapter)).items()
    }
    settings = settings_of(model.lora, model.config, base=base)
    with new_folder(folder) as partial:
        save_file(named, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in a PEFT folder, for a model of this config, as a start for more training or for merging.

    Raises:
        ValueError: naming every unknown, doubled, missing and misshaped tensor; when the adapter is another model's, is
            on only some layers or on modules outside the decoder, or is of a kind that would compute something else.
    """
    if not (folder / WEIGHTS).exists():
        raise ValueError(
            f"{folder} is not a PEFT adapter folder: it has no {WEIGHTS} (pickled adapters are never read)"
        )
    settings = read_json(folder / CONFIG)
    try:
        check_settings(settings)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    try:
        found: dict[str, np.ndarray] = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is not a whole safetensors file: {error}") from None
    source = _our_names(found, config, folder)
    targets = tuple(t for t in ATTENTION_AND_FEED_FORWARD if any(f".{t}.lora_" in name for name in source))
    if not targets:
        raise ValueError(
            f"{folder / WEIGHTS} is on none of {', '.join(ATTENTION_AND_FEED_FORWARD)}, but on others such as "
            f"{shown(next(iter(found)), 300)}; merge it where it was made"
        )
    _check_layers(source, targets, config, folder)
    try:
        spec = read_spec(settings, targets)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    shapes = {name: shape for name, shape in Model(config, lora=spec).shapes.items() if is_adapter(name)}
    problems = [f"missing {name}" for name in shapes if name not in source]
    problems += [f"unknown {where}" for name, where in source.items() if name not in shapes]
    problems += [
        f"{where} is {list(found[where].shape)}, this model needs {list(shapes[name].shape)}"
        for name, where in source.items()
        if name in shapes and found[where].shape != shapes[name].shape
    ]
    problems += [f"{where} is of {v.dtype}" for where, v in found.items() if not jnp.issubdtype(v.dtype, jnp.floating)]
    if problems:
        raise ValueError(f"{folder} does not fit this model: {_some(problems)}")
    params = {name: jnp.asarray(found[source[name]], jnp.float32) for name in shapes}
    broken = [source[name] for name, value in params.items() if not np.isfinite(value).all()]
    if broken:
        raise ValueError(f"{folder} holds NaN or infinite numbers, as of a run that diverged: {_some(broken)}")
    return Adapter(spec, params, settings.get("base_model_name_or_path"))


def _our_names(found: Iterable[str], config: ModelConfig, folder: Path) -> dict[str, str]:
    """Our parameter -> the tensor in a PEFT file that holds it. ValueError for tensors of anything but the decoder."""
    here = module_prefix(config)
    earlier = None if config.vision is None else EARLIER_PREFIX[config.family]
    source: dict[str, str] = {}
    strange: list[str] = []
    spelled_earlier = False
    for name in found:
        match = TENSOR.fullmatch(name)
        module = "" if match is None else match["module"]
        if module.startswith(here + "layers."):
            inside = module.removeprefix(here)
        elif earlier is not None and module.startswith(earlier + "layers."):
            inside = module.removeprefix(earlier)
            spelled_earlier = True
        else:
            strange.append(name)
            continue
        part = MAGNITUDE if match["matrix"] is None else f".lora_{match['matrix']}.weight"
        ours = f"language_model.{inside}{part}"
        if ours in source:
            raise ValueError(
                f"{folder / WEIGHTS} holds {shown(ours, 300)} twice: as {shown(source[ours], 300)} and as {shown(name, 300)}"
            )
        source[ours] = name
    if strange:
        raise ValueError(
            f"{folder / WEIGHTS} is no adapter of this model's decoder: {len(strange)} of {len(strange) + len(source)} "
            f"tensors such as {shown(strange[0], 300)}, {_explain(strange[0], config)}"
        )
    if not source:
        raise ValueError(f"{folder / WEIGHTS} holds no tensors")
    if spelled_earlier:
        log.warning(
            "%s names layers %slayers..., as earlier transformers named this decoder; read as %slayers..., of %s",
            *(folder, earlier, here, config.family),
        )
    return source


def _explain(name: str, config: ModelConfig) -> str:
    """What a tensor that is none of the decoder's belongs to, and what to do."""
    for pattern, what in ELSEWHERE:
        if pattern.search(name):
            return (
                f"which are on {what}; only the decoder carries an adapter here: train it with target_modules that "
                "name the decoder's projections only, or merge it where it was made"
            )
    expected = f"expected names that begin with {PREFIX}{module_prefix(config)}layers."
    path = name.removeprefix(PREFIX)
    if config.vision is not None and path.startswith("model.layers."):
        return (
            f"as a text model's adapter has; {expected}, for this is a vision-language model "
            "(PEFT would load nothing from them, with only a warning)"
        )
    if config.vision is None and "language_model." in path:
        return f"as a vision-language model's adapter has; {expected}, for this is a text model"
    return expected


def _check_layers(source: Iterable[str], targets: tuple[str, ...], config: ModelConfig, folder: Path) -> None:
    """ValueError when a projection carries the adapter in some layers only, or in layers this model does not have."""
    count = len(config.decoder.layers)
    on: dict[str, set[int]] = {target: set() for target in targets}
    for name in source:
        match = re.fullmatch(r"language_model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_.*", name)
        if match is not None and match[2] in on:
            on[match[2]].add(int(match[1]))
    beyond = sorted(set().union(*on.values()) - set(range(count)))
    if beyond:
        raise ValueError(
            f"{folder} is another model's adapter: it is on layers up to {beyond[-1]}, this model has {count} layers "
            f"(0-{count - 1})"
        )
    partly = {target: layers for target, layers in on.items() if len(layers) < count}
    if partly:
        parts = "; ".join(
            f"{target} in layers {_ranges(layers)}, not in {_ranges(set(range(count)) - layers)}"
            for target, layers in partly.items()
        )
        raise ValueError(
            f"{folder} adapts only some of this model's {count} layers: {parts}. Here an adapter is on every layer: "
            "merge it where it was made, or train it again on all layers"
        )


def _ranges(numbers: set[int]) -> str:
    """0-2, 5"""
    ordered = sorted(numbers)
    starts = [n for n in ordered if n - 1 not in numbers]
    ends = [n for n in ordered if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def _some(problems: list[str]) -> str:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return ", ".join(shown(problem, 300) for problem in problems[:SHOWN]) + more
