"""What a user leaves with: an adapter or a merged model that other tools load, compared with ours before it is called done.

A merged model is written file by file in the layout and under the tensor names of the checkpoint it came from, so
whatever could read that folder can read this one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vlmalign.models.families import FAMILIES
from vlmalign.models.lora import merge_adapter
from vlmalign.models.model import Model
from vlmalign.shapes import Array, Float
from vlmalign.types import GroupBatch
from vlmalign.weights.adapter import load_adapter, save_adapter
from vlmalign.weights.checkpoint import INDEX, load_params, tensor_files

#: largest difference of a logit that an export may show, relative to the largest logit
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

#: files of a checkpoint folder that are not weights and are carried over as they are
KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt")


def probe(vocab: int, length: int = 24) -> GroupBatch:
    """A fixed row of text tokens spread over the vocabulary, on which two models are compared."""
    tokens = np.linspace(1, vocab - 1, length).astype(np.int32)[None]
    zeros = np.zeros_like(tokens)
    order = np.arange(length, dtype=np.int32)[None]
    return GroupBatch(
        tokens, zeros, order, order, zeros - 1, zeros - 1, np.zeros((1, 0, 0), np.float32), np.zeros(1, np.int32)
    )


def probe_logits(model: Model, params: Mapping[str, Array]) -> Float[np.ndarray, "tokens vocab"]:
    """Logits on the probe, float32."""
    hidden = jax.jit(model.hidden)(params, probe(model.config.decoder.vocab))[0]
    return np.asarray(jnp.einsum("td,vd->tv", hidden, model.head(params), preferred_element_type=jnp.float32))


def _compare(what: str, found: np.ndarray, expected: np.ndarray, dtype: str) -> float:
    gap = float(np.max(np.abs(found - expected)) / max(1.0, float(np.max(np.abs(expected)))))
    if not gap <= TOLERANCE[dtype]:
        raise ValueError(f"{what} was written, but read again its logits differ by {gap:.2g}; do not use it")
    return gap


def export_adapter(
    folder: Path, model: Model, base: Mapping[str, Array], adapter: Mapping[str, Array], *, base_path: str
) -> float:
    """Write a PEFT folder, read it again, and return the largest relative difference of a logit.

    Raises:
        ValueError: when what was read again does not compute the same.
    """
    save_adapter(folder, adapter, model, base=base_path)
    again = load_adapter(folder, model.config)
    expected = probe_logits(model, {**base, **adapter})
    return _compare(str(folder), probe_logits(model, {**base, **again.params}), expected, model.dtype)


def export_merged(
    folder: Path, source: Path, model: Model, base: Mapping[str, Array], adapter: Mapping[str, Array]
) -> float:
    """Write `source` with the adapter merged into its weights, in the dtype they have there; read it again, compare.

    Tensors that the adapter does not touch are copied bit for bit. Returns the largest relative difference of a logit.

    Raises:
        ValueError: when `folder` exists and is not empty, or what was read again does not compute the same.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty; choose a new folder for the merged model")
    folder.mkdir(parents=True, exist_ok=True)
    rename = FAMILIES[model.config.family].parameter_name
    merged = merge_adapter(base, adapter, model.lora.scale)
    weights: dict[str, str] = {}
    for file in tensor_files(source):
        tensors = {}
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                value = opened.get_tensor(name)
                ours = rename(name, model.config)
                if ours is not None and merged[ours] is not base[ours]:
                    value = np.asarray(merged[ours].astype(jnp.float32)).astype(value.dtype)
                tensors[name] = np.ascontiguousarray(value)
                weights[name] = file.name
        partial = folder / (file.name + ".partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, folder / file.name)
    for file in source.iterdir():
        if file.is_file() and file.suffix in KEPT_SUFFIXES and file.name != INDEX:
            shutil.copyfile(file, folder / file.name)
    if (source / INDEX).exists():
        size = sum((folder / name).stat().st_size for name in set(weights.values()))
        index = {"metadata": {"total_size": size}, "weight_map": weights}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    plain = model.without_lora()
    again = load_params(folder, plain)
    return _compare(str(folder), probe_logits(plain, again), probe_logits(plain, merged), model.dtype)
