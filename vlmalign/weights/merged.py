"""The files of a merged model: a checkpoint folder again, with an adapter taken into its weights.

Names, and by default dtypes and the split into files, are those of the checkpoint it is made from, so whatever could
read that folder can read this one. Memory: the tensors of one file that is written, and one matrix in float32.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vlmalign.models.lora import MAGNITUDE, merge_matrix
from vlmalign.models.model import Model
from vlmalign.shapes import Array
from vlmalign.weights.layout import FLOATS, INDEX, SINGLE, Stored, account, read_json, stored_tensors, tensor_files

#: what is carried over as it is: tokenizer, processor, generation settings, chat templates, the model's licence
KEPT_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
KEPT_NAMES = ("LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md")
KEPT_FOLDERS = ("additional_chat_templates",)
#: and what is not: the index is written anew; beside an adapter's settings transformers looks for the adapter
LEFT = (INDEX, "adapter_config.json")

_merge = jax.jit(merge_matrix, static_argnames="scale")


class Planned(NamedTuple):
    """One tensor to be written."""

    stored: Stored  #: where it comes from
    adapted: str | None  #: our name of the matrix, when the adapter is on it
    dtype: str  #: to be written in, NumPy's name

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def bytes(self) -> int:
        return math.prod(self.stored.shape) * jnp.dtype(self.dtype).itemsize


Plan = dict[str, list[Planned]]  # file name -> its tensors


def plan_merged(
    source: Path, model: Model, adapter: Mapping[str, Array], *, dtype: str | None, max_shard_bytes: int | None
) -> Plan:
    """Which tensors go into which file: as in `source`, or newly split into files of at most `max_shard_bytes`.

    `dtype` None keeps each tensor's own. A tensor larger than `max_shard_bytes` gets a file to itself.

    Raises:
        ValueError: when a tensor of `source` is not float32, bfloat16 or float16.
    """
    sources = account(source, model).sources
    ours = [name.replace(".lora_A.", ".") for name in adapter if ".lora_A." in name]
    adapted = {sources[name].name: name for name in ours}
    planned = []
    for stored in stored_tensors(tensor_files(source)):
        if stored.dtype not in FLOATS:
            raise ValueError(f"{stored.file}: {stored.name} is {stored.dtype}; expected one of {', '.join(FLOATS)}")
        planned.append(Planned(stored, adapted.get(stored.name), dtype or FLOATS[stored.dtype]))
    if max_shard_bytes is not None:
        return _split(planned, max_shard_bytes)
    files: Plan = {}
    for tensor in planned:
        files.setdefault(tensor.stored.file.name, []).append(tensor)
    return files


def _split(planned: list[Planned], limit: int) -> Plan:
    """Filled in order, a new file where the next tensor would not fit, named as `transformers` names them."""
    shards: list[list[Planned]] = []
    size = limit + 1
    for tensor in planned:
        if size + tensor.bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.bytes
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _value(tensor: Planned, adapter: Mapping[str, Array], scale: float) -> np.ndarray:
    """What is written: merged in float32 and rounded once, or the source's own."""
    with safe_open(tensor.stored.file, framework="numpy") as opened:
        value = opened.get_tensor(tensor.name)
    if tensor.adapted is not None:
        part = tensor.adapted.removesuffix(".weight")
        a, b = (adapter[f"{part}.lora_{m}.weight"] for m in "AB")
        value = np.asarray(_merge(jnp.asarray(value, jnp.float32), a, b, adapter.get(part + MAGNITUDE), scale=scale))
    return np.ascontiguousarray(value.astype(jnp.dtype(tensor.dtype), copy=False))


def write_merged(
    folder: Path, source: Path, plan: Plan, adapter: Mapping[str, Array], scale: float, *, dtype: str | None
) -> None:
    """Fill the empty `folder`: weights, their index, and every other file of `source` that a model is opened with.

    config.json is changed only where it names the dtype of the weights, when `dtype` is given.
    """
    for name in sorted(plan):
        tensors = {tensor.name: _value(tensor, adapter, scale) for tensor in plan[name]}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        del tensors  # before the next file's are made
    for file in sorted(source.iterdir()):
        if file.is_dir() and file.name in KEPT_FOLDERS:
            shutil.copytree(file, folder / file.name)
        elif file.is_file() and (file.suffix in KEPT_SUFFIXES or file.name in KEPT_NAMES) and file.name not in LEFT:
            shutil.copyfile(file, folder / file.name)
    if set(plan) != {SINGLE}:
        index = {
            "metadata": {"total_size": sum(tensor.bytes for tensors in plan.values() for tensor in tensors)},
            "weight_map": {tensor.name: name for name in sorted(plan) for tensor in plan[name]},
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if dtype is not None:
        _state_dtype(folder / "config.json", dtype)


def _state_dtype(path: Path, dtype: str) -> None:
    """Make config.json say `dtype` wherever it names one, and at least at its top."""

    def restate(part: dict[str, Any]) -> dict[str, Any]:
        return {
            key: restate(value) if isinstance(value, dict) else dtype if key in ("dtype", "torch_dtype") else value
            for key, value in part.items()
        }

    config = restate(read_json(path))
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def check_merged(folder: Path, plan: Plan, adapter: Mapping[str, Array], scale: float) -> None:
    """Read every file again and compare every tensor, bit for bit, with the source or with the merge taken anew.

    Raises:
        ValueError: naming the tensors that differ.
    """
    wrong = [
        f"{tensor.name} in {name}"
        for name, tensors in plan.items()
        for tensor, found in zip(tensors, _read(folder / name, tensors), strict=True)
        if found.dtype != jnp.dtype(tensor.dtype) or not _same_bits(found, _value(tensor, adapter, scale))
    ]
    if wrong:
        raise ValueError(f"{folder} was written, but read again {len(wrong)} tensors differ, such as {wrong[0]}")


def _read(file: Path, tensors: list[Planned]) -> Iterator[np.ndarray]:
    with safe_open(file, framework="numpy") as opened:
        if set(opened.keys()) != {tensor.name for tensor in tensors}:
            raise ValueError(f"{file} was written, but read again it holds other tensors")
        for tensor in tensors:
            yield opened.get_tensor(tensor.name)


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    # By bits, not by value: a NaN that a checkpoint holds equals itself, and 0 is not -0.
    flat = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return a.shape == b.shape and np.array_equal(*flat)
