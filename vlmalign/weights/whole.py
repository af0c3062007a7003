"""A checkpoint folder again after a whole decoder was trained: the source's names, dtypes and split into files."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from vlmalign.models.families import FAMILIES
from vlmalign.models.model import Model
from vlmalign.shapes import Array
from vlmalign.weights.layout import FLOATS, Stored, account, describe, stored_tensors, tensor_files
from vlmalign.weights.merged import KEPT_FOLDERS, KEPT_NAMES, KEPT_SUFFIXES
from vlmalign.weights.new_folder import new_folder

EMBEDDING = "language_model.embed_tokens.weight"
ADAPTER = "adapter_config.json"


def export_whole(folder: Path, source: Path, model: Model, params: Mapping[str, Array]) -> None:
    """Write the checkpoint folder `source` with `params` in place of its own, each rounded once to the dtype it had there.

    Tensors that `params` does not hold are carried over; a copy of a tied embedding becomes a copy of the new one. The
    folder is read again and compared bit for bit before it has its name. Memory: the tensors of one file.

    Raises:
        ValueError: when `folder` exists and is not empty, when `params` holds what the model has not, and for a value
            that its dtype in the file cannot hold (then nothing is left of it).
    """
    found = account(source, model)
    if found.problems:
        raise ValueError(f"{source} does not fit its config.json. " + "; ".join(describe(found.problems)))
    if strange := sorted(params.keys() - found.sources.keys()):
        raise ValueError(f"parameters that {source} does not have: {', '.join(strange[:5])}")
    ours = {stored.name: name for name, stored in found.sources.items()}
    files: dict[str, list[Stored]] = {}
    for stored in stored_tensors(tensor_files(source)):
        files.setdefault(stored.file.name, []).append(stored)

    def value(stored: Stored) -> np.ndarray:
        name = ours.get(stored.name)
        if name is None and _is_tied_head(stored.name, model):
            name = EMBEDDING
        if name not in params:
            with safe_open(stored.file, framework="numpy") as opened:
                return opened.get_tensor(stored.name)
        with np.errstate(over="ignore"):  # said below, in words
            rounded = np.ascontiguousarray(np.asarray(params[name]).astype(jnp.dtype(FLOATS[stored.dtype])))
        if not np.isfinite(rounded.astype(np.float32)).all():
            raise ValueError(
                f"{name} holds a number that {stored.name} cannot, which is {stored.dtype}, or none at all"
            )
        return rounded

    with new_folder(folder) as partial_folder:
        for file, tensors in files.items():
            save_file({s.name: value(s) for s in tensors}, partial_folder / file, metadata={"format": "pt"})
        for kept in sorted(source.iterdir()):
            if kept.is_dir() and kept.name in KEPT_FOLDERS:
                shutil.copytree(kept, partial_folder / kept.name)
            # With an adapter's settings beside it, `transformers` would take the folder for an adapter.
            elif kept.name != ADAPTER and kept.is_file() and (kept.suffix in KEPT_SUFFIXES or kept.name in KEPT_NAMES):
                shutil.copyfile(kept, partial_folder / kept.name)
        for file, tensors in files.items():
            with safe_open(partial_folder / file, framework="numpy") as opened:
                wrong = [s.name for s in tensors if not _same_bits(opened.get_tensor(s.name), value(s))]
            if wrong:
                raise ValueError(f"{folder} was written, but read again {', '.join(wrong[:5])} differ")


def _is_tied_head(name: str, model: Model) -> bool:
    """True for an output matrix that a file repeats although the model takes its embedding for it."""
    known = FAMILIES[model.config.family].parameter_name(name, model.config)
    return known is None and model.config.decoder.tied_head and name.split(".")[-2:] == ["lm_head", "weight"]


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    # By bits, not by value: a NaN that a checkpoint holds equals itself, and 0 is not -0.
    flat = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(*flat)
