"""Hugging Face checkpoint folders: config.json and single or sharded safetensors, every tensor accounted for.

Weights go from the file to their place tensor by tensor, and under a sharding slice by slice, so that loading needs
little more host memory than what stays there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vlmalign.models.config import ModelConfig
from vlmalign.models.families import FAMILIES, read_config
from vlmalign.models.model import Model
from vlmalign.quoting import MOST_OF_LINE, quoted, shown
from vlmalign.shapes import Array
from vlmalign.weights.layout import (
    FLOATS,
    INDEX,
    SHOWN,
    SINGLE,
    Stored,
    account,
    describe,
    read_json,
    stored_tensors,
    tensor_files,
)

__all__ = [
    "INDEX",
    "SHOWN",
    "load_config",
    "load_params",
    "parse_config",
    "read_json",
    "refusals",
    "save_params",
    "stored_dtype",
    "tensor_files",
]

#: where a parameter goes: its name, shape and dtype -> its sharding
Placement = Callable[[str, jax.ShapeDtypeStruct], jax.sharding.Sharding]
#: called as weights arrive, with bytes of the files read so far and in all
Advance = Callable[[int, int], None]

#: our name of the embedding table
EMBEDDING = "language_model.embed_tokens.weight"

#: bytes of a tensor that are held in the file's dtype while they are cast
CHUNK = 16 << 20

#: of a network, and of any size of it: what is beyond is a mistake, and would fill the memory
MOST_LAYERS, MOST_SIZE = 1000, 2**31 - 1

#: endings of the class names, in a config's `architectures`, of models that write text
GENERATORS = ("ForCausalLM", "ForConditionalGeneration")


def refusals(config: Mapping[str, Any]) -> list[str]:
    """Why a parsed config.json describes nothing that is read here, whatever its family; empty when nothing is wrong."""
    found = []
    if "auto_map" in config:
        found.append(
            "config.json asks for code of its own (auto_map), which is never run; "
            "use a checkpoint of a family that vlmalign knows"
        )
    for part in (config, config.get("text_config")):
        settings = part.get("quantization_config") if isinstance(part, Mapping) else None
        if settings:
            method = settings.get("quant_method", "of unknown kind") if isinstance(settings, Mapping) else settings
            found.append(
                f"config.json says that the weights are quantised (quantization_config: {shown(method)}), which is not read "
                "here; use the checkpoint they were made from, or dequantise them where they were made (in "
                "transformers: model.dequantize(), then save_pretrained)"
            )
            break
    named = config.get("architectures") or ()
    named = named if isinstance(named, list | tuple) else [named]
    others = [shown(name) for name in named if not str(name).endswith(GENERATORS)]
    if others:
        found.append(
            f"config.json describes a {', '.join(others)}; only models that write text are read here "
            f"(architectures ending in {' or '.join(GENERATORS)}), not classifiers, rewards or bare encoders"
        )
    if any(
        isinstance(part, Mapping) and part.get("is_causal") is False for part in (config, config.get("text_config"))
    ):
        found.append(
            "config.json says is_causal: false, as encoders made from such models do; here a token never sees later text"
        )
    return found


def load_config(folder: Path) -> ModelConfig:
    """The model that `folder/config.json` describes. Code in checkpoints is never run.

    Raises:
        ValueError: when the file is missing or broken, the family is unknown, or a setting is not supported.
    """
    config = read_json(folder / "config.json")
    if wrong := refusals(config):
        raise ValueError(f"{folder}: {'; '.join(wrong)}")
    try:
        return parse_config(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {shown(error, MOST_OF_LINE)}") from error.__cause__


def stored_dtype(folder: Path) -> str:
    """The dtype that a checkpoint was saved in, as its config.json says; float32 where it says nothing.

    Raises:
        ValueError: for float16, which nothing here is computed in.
    """
    config = read_json(folder / "config.json")
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and (found := part.get("dtype") or part.get("torch_dtype")):
            if not isinstance(found, str):
                raise ValueError(f"{folder}: config.json must name the dtype of the weights, found {quoted(found)}")
            if found == "float16":
                raise ValueError(
                    f"{folder} was saved in float16, which the activations of these models overflow; "
                    "set dtype to bfloat16 or float32"
                )
            return found
    return "float32"


def parse_config(config: Mapping[str, Any]) -> ModelConfig:
    """The model that a parsed config.json describes; ValueError for an unknown family and for settings out of place."""
    for part in (config, config.get("text_config"), config.get("vision_config")):
        for key in ("num_hidden_layers", "depth") if isinstance(part, Mapping) else ():
            if isinstance(part.get(key), int | float) and not part[key] <= MOST_LAYERS:
                raise ValueError(f"config.json: {key} must be at most {MOST_LAYERS}, found {quoted(part[key])}")
    try:
        found = read_config(config)
    # What arithmetic on a value of another kind, or out of range, comes to.
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        why = shown(repr(error), MOST_OF_LINE // 2)
        raise ValueError(f"config.json: a setting is missing or of the wrong kind ({why})") from error
    for name, part in (("decoder", found.decoder), ("vision tower", found.vision)):
        if part is not None and (wrong := out_of_place(part)):
            raise ValueError(
                f"config.json: settings of the {name} are missing or of the wrong kind: {', '.join(wrong)}"
            )
    ropes = {spec.rope for spec in found.decoder.layers}
    if not all(math.isfinite(number) and number > 0 for rope in ropes for number in (rope.theta, rope.factor)):
        raise ValueError("config.json: the rotary settings must be finite numbers above 0: rope_theta, and factor")
    if found.decoder.heads % found.decoder.kv_heads:
        raise ValueError(
            f"config.json: num_attention_heads must be a multiple of num_key_value_heads, found {found.decoder.heads} "
            f"and {found.decoder.kv_heads}"
        )
    return found


def out_of_place(part: Any) -> list[str]:
    """Sizes (which are whole numbers above 0), switches and numbers of a config record that JSON gave as something else.

    A word such as "false" would count as true, and a size of 96.0 would fail far from here.
    """
    wrong = []
    for field in fields(part):
        value, kind = getattr(part, field.name), field.type
        if (
            (kind == "int" and (type(value) is not int or not 1 <= value <= MOST_SIZE))
            or (kind == "bool" and type(value) is not bool)
            or (kind == "float" and (type(value) not in (int, float) or not math.isfinite(value)))
        ):
            wrong.append(f"{field.name} = {quoted(value)}")
    return wrong


def load_params(
    folder: Path, model: Model, *, sharding: Placement | None = None, advance: Advance | None = None
) -> dict[str, Array]:
    """Base parameters of `model` from `folder`, cast to `model.dtype`, each where `sharding` places it.

    Without `sharding` they go to JAX's default device. Names, shapes and dtypes are checked from the files' headers
    before any tensor is read. Of a sharded tensor a process reads only the slices that its own devices hold, each
    once however many devices hold it. Beyond the parameters, host memory holds one tensor (of the sharded ones: this
    process's share of it) and `CHUNK` bytes.

    Raises:
        ValueError: naming every tensor that is unknown, missing, doubled, misshaped or of a dtype that is not read; when
            config.json ties the output head to the embedding, and the files hold a head that is another matrix.
    """
    sources, problems = account(folder, model)
    if problems:
        raise ValueError(f"{folder} does not fit its config.json. " + "; ".join(describe(problems)))
    if model.config.decoder.tied_head:
        _check_stored_heads(folder, sources[EMBEDDING])
    expected = model.without_lora().shapes
    by_file: dict[Path, list[str]] = {}
    for name, stored in sources.items():
        by_file.setdefault(stored.file, []).append(name)
    total, done = sum(stored.nbytes for stored in sources.values()), 0
    params: dict[str, Array] = {}
    for file, names in by_file.items():
        with safe_open(file, framework="numpy") as opened:
            for name in names:
                place = None if sharding is None else sharding(name, expected[name])
                params[name] = _load(opened, sources[name], expected[name].dtype, place)
                # One at a time: device copies run behind, and each keeps its host buffer until it is done.
                jax.block_until_ready(params[name])
                done += sources[name].nbytes
                if advance is not None:
                    advance(done, total)
    return {name: params[name] for name in expected}


def _check_stored_heads(folder: Path, embedding: Stored) -> None:
    """ValueError for a stored output head that is not the embedding again: whose tying is a mistake of config.json."""
    for head in stored_tensors(tensor_files(folder)):
        if head.name.endswith("lm_head.weight") and not _equal(head, embedding):
            raise ValueError(
                f"{folder}: config.json ties the output head to the embedding (tie_word_embeddings), but {head.name} is "
                f"another matrix than {embedding.name}; set tie_word_embeddings to false if the head was trained, or "
                f"remove {head.name} from the files"
            )


def _equal(one: Stored, other: Stored) -> bool:
    """Whether two stored matrices are the same numbers, read `CHUNK` bytes at a time."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    rows = max(1, CHUNK // (one.nbytes // one.shape[0]))
    with safe_open(one.file, framework="numpy") as first, safe_open(other.file, framework="numpy") as second:
        a, b = first.get_slice(one.name), second.get_slice(other.name)
        parts = [slice(start, min(start + rows, one.shape[0])) for start in range(0, one.shape[0], rows)]
        return all(np.array_equal(a[part], b[part]) for part in parts)


def _load(opened: Any, stored: Stored, dtype: jnp.dtype, place: jax.sharding.Sharding | None) -> Array:
    if place is None:
        return jax.device_put(_read(opened, stored, dtype, tuple(slice(0, n) for n in stored.shape)))
    read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        # Devices that hold the same part of a tensor ask for it one by one.
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, stored.shape, strict=True))
        if bounds not in read:
            read[bounds] = _read(opened, stored, dtype, tuple(slice(*b) for b in bounds))
        return read[bounds]

    return jax.make_array_from_callback(stored.shape, place, part, dtype=dtype)


def _read(opened: Any, stored: Stored, dtype: jnp.dtype, index: tuple[slice, ...]) -> np.ndarray:
    """Part of a tensor in host memory of its own, in `dtype`."""
    piece = opened.get_slice(stored.name)
    shape = tuple(s.stop - s.start for s in index)
    kept = jnp.dtype(FLOATS[stored.dtype])
    if kept == dtype:
        return piece[index]
    out = np.empty(shape, dtype)
    rows = max(1, CHUNK // (out[0].size * kept.itemsize))
    first = index[0].start
    for start in range(0, len(out), rows):
        stop = min(start + rows, len(out))
        out[start:stop] = piece[(slice(first + start, first + stop), *index[1:])]
    return out


def save_params(folder: Path, params: Mapping[str, Array], model: Model, config: Mapping[str, Any]) -> None:
    """Write `config.json` and one safetensors file under the checkpoint's own tensor names."""
    folder.mkdir(parents=True, exist_ok=True)
    rename = FAMILIES[model.config.family].file_name
    host = jax.device_get(dict(params))
    tensors = {rename(name, model.config): np.ascontiguousarray(value) for name, value in host.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
