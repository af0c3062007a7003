"""Hugging Face checkpoint folders: config.json and single or sharded safetensors, every tensor accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vlmalign.models.config import ModelConfig
from vlmalign.models.families import FAMILIES, read_config
from vlmalign.models.model import Model
from vlmalign.shapes import Array

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

#: problems of one kind named in an error before it says "and N more"
SHOWN = 8


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ValueError naming the file when it is missing or broken."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is not a checkpoint folder: it has no {path.name}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found


def load_config(folder: Path) -> ModelConfig:
    """The model that `folder/config.json` describes. Code in checkpoints is never run."""
    config = read_json(folder / "config.json")
    if "auto_map" in config:
        raise ValueError(
            f"{folder}/config.json asks for code of its own (auto_map), which is never run; "
            "use a checkpoint of a family that vlmalign knows"
        )
    try:
        return read_config(config)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, or the single file."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{folder / INDEX} has no weight_map from tensor names to file names")
        names = sorted(set(weight_map.values()))
        if any(name in ("", ".", "..") or "/" in name or "\\" in name for name in names):
            raise ValueError(f"{folder / INDEX} names a file outside its folder")
        files = [folder / name for name in names]
    else:
        files = [folder / SINGLE]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        other = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.pt*"))
        hint = (
            f" (found {', '.join(other)}: pickled weights are never read; convert them to safetensors)" if other else ""
        )
        raise ValueError(f"{folder} lacks {', '.join(missing[:SHOWN])}{hint}")
    return files


def _tensors(files: list[Path]) -> Iterator[tuple[str, Path, Any]]:
    for file in files:
        try:
            with safe_open(file, framework="numpy") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a mapping
                    yield name, file, opened
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from None


def load_params(folder: Path, model: Model) -> dict[str, Array]:
    """Base parameters of `model` from `folder`, cast to `model.dtype`.

    Raises:
        ValueError: naming every unknown, missing, doubled and misshaped tensor.
    """
    expected = model.without_lora().shapes
    rename = FAMILIES[model.config.family].parameter_name
    files = tensor_files(folder)
    source: dict[str, str] = {}
    problems: dict[str, list[str]] = {"unknown": [], "doubled": [], "misshaped": [], "missing": []}
    params: dict[str, Array] = {}
    for name, _, opened in _tensors(files):
        ours = rename(name, model.config)
        if ours is None:
            continue
        if ours not in expected:
            problems["unknown"].append(name)
            continue
        if ours in source:
            problems["doubled"].append(f"{name} (already read as {source[ours]})")
            continue
        source[ours] = name
        shape = tuple(opened.get_slice(name).get_shape())
        if shape != expected[ours].shape:
            problems["misshaped"].append(f"{name} is {list(shape)}, config.json says {list(expected[ours].shape)}")
            continue
        params[ours] = jnp.asarray(opened.get_tensor(name), dtype=expected[ours].dtype)
    problems["missing"] = [name for name in expected if name not in source]
    if any(problems.values()):
        raise ValueError(f"{folder} does not fit its config.json. " + _describe(problems))
    return params


def _describe(problems: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            parts.append(f"{kind} ({len(names)}): {', '.join(names[:SHOWN])}{more}")
    return "; ".join(parts)


def save_params(folder: Path, params: Mapping[str, Array], model: Model, config: Mapping[str, Any]) -> None:
    """Write `config.json` and one safetensors file under the checkpoint's own tensor names."""
    folder.mkdir(parents=True, exist_ok=True)
    rename = FAMILIES[model.config.family].file_name
    host = jax.device_get(dict(params))
    tensors = {rename(name, model.config): np.ascontiguousarray(value) for name, value in host.items()}
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
