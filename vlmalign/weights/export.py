"""What a user leaves with: an adapter or a merged model that other tools load, compared with ours before it is called done.

An export is written beside its place, read again, compared, and only then given its name: a folder of that name is a
whole one, and one whose logits differ is removed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vlmalign.models.lora import merge_adapter
from vlmalign.models.model import Model
from vlmalign.shapes import Array, Float
from vlmalign.types import GroupBatch
from vlmalign.weights.adapter import load_adapter, save_adapter
from vlmalign.weights.checkpoint import load_params
from vlmalign.weights.merged import check_merged, plan_merged, write_merged
from vlmalign.weights.new_folder import new_folder

#: largest difference of a logit that the same function may show when computed another way, relative to the largest
#: logit (but at least 1), by the dtype of the arithmetic
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

#: what rounding the merged weights may add to that; one of 24 layers and width 1,024 showed 0.011 in bfloat16
ROUNDING = {"float32": 0.0, "float16": 2e-2, "bfloat16": 1e-1}


class Exported(NamedTuple):
    """A finished export."""

    files: dict[str, int]  #: name -> bytes
    gap: float  #: largest difference of a logit between what was read again and the adapter on its base, over the largest
    effect: float  #: the same between the bare base and the adapter on it: what a lost adapter would show
    tolerance: float  #: what `gap` was allowed to be
    rounded_to: str | None  #: the coarsest dtype that merged weights were rounded to; None when none was


def probe(vocab: int, length: int = 24) -> GroupBatch:
    """A fixed row of text tokens spread over the vocabulary, on which two models are compared."""
    tokens = np.linspace(1, vocab - 1, length).astype(np.int32)[None]
    zeros = np.zeros_like(tokens)
    order = np.arange(length, dtype=np.int32)[None]
    return GroupBatch(
        tokens, zeros, order, order, zeros - 1, zeros - 1, np.zeros((1, 0, 0), np.float32), np.zeros(1, np.int32)
    )


@partial(jax.jit, static_argnames="model")
def _logits(model: Model, params: Mapping[str, Array], batch: GroupBatch) -> Float[Array, "tokens vocab"]:
    hidden = model.hidden(params, batch)[0]
    return jnp.einsum("td,vd->tv", hidden, model.head(params), preferred_element_type=jnp.float32)


def probe_logits(model: Model, params: Mapping[str, Array]) -> Float[np.ndarray, "tokens vocab"]:
    """Logits on the probe (before any soft cap), float32."""
    # Accelerators multiply float32 matrices in fewer bits unless asked not to; that would drown what is compared.
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(model, params, probe(model.config.decoder.vocab)))


def _gap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.max(np.abs(found - expected)) / max(1.0, float(np.max(np.abs(expected)))))


def _check(folder: Path, what: str, gap: float, tolerance: float, effect: float) -> None:
    if not gap <= tolerance:
        raise ValueError(
            f"the export to {folder} was removed: {what}, its logits differ by {gap:.2g} of the largest, "
            f"allowed is {tolerance:.2g} (the adapter itself moves them by {effect:.2g})"
        )


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return dict(sorted((path.relative_to(folder).as_posix(), path.stat().st_size) for path in files))


def export_adapter(
    folder: Path, model: Model, base: Mapping[str, Array], adapter: Mapping[str, Array], *, base_path: str
) -> Exported:
    """Write a PEFT folder, read it again and compare its logits; `base_path` is recorded as the model it belongs to.

    Raises:
        ValueError: when `folder` exists and is not empty, or what was read again does not compute the same (then nothing
            is left of it).
    """
    expected = probe_logits(model, {**base, **adapter})
    with new_folder(folder) as partial_folder:
        save_adapter(partial_folder, adapter, model, base=base_path)
        again = load_adapter(partial_folder, model.config)
        if again.spec != model.lora:
            raise ValueError(f"{folder} was written, but read again its settings are {again.spec}, not {model.lora}")
        gap = _gap(probe_logits(model, {**base, **again.params}), expected)
        effect = _gap(probe_logits(model.without_lora(), base), expected)
        _check(folder, "read again", gap, TOLERANCE[model.dtype], effect)
        return Exported(_sizes(partial_folder), gap, effect, TOLERANCE[model.dtype], None)


def _merge_in_place(params: dict[str, Array], adapter: Mapping[str, Array], scale: float) -> None:
    """One matrix after the other, so that two sets of parameters are never held."""
    for name in adapter:
        if ".lora_A." in name:
            module = name.removesuffix("lora_A.weight")
            own = {key: value for key, value in adapter.items() if key.startswith(module + "lora_")}
            params |= merge_adapter({module + "weight": params[module + "weight"]}, own, scale)


def export_merged(
    folder: Path,
    source: Path,
    model: Model,
    adapter: Mapping[str, Array],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
) -> Exported:
    """Write the checkpoint folder `source` with the adapter merged into its weights; read it again, compare.

    `dtype` ("float32", "float16", "bfloat16") is that of the written weights, by default each tensor's own in `source`;
    `max_shard_bytes` splits them anew, by default they lie in files as in `source`.

    What is compared: every tensor, bit for bit, with the source's own, or with the merge taken in float32 and rounded
    once; and logits on a row of text, in arithmetic of `model.dtype` (float32 shows most): the merged weights before
    rounding within TOLERANCE of the adapter on its base, what was read again within that and ROUNDING.

    Memory: one set of base parameters in `model.dtype` (the source's before writing, what was written after it), one
    matrix in float32, and while writing the tensors of one file. A caller's own parameters come on top.

    Raises:
        ValueError: when `folder` exists and is not empty, or what was read again does not compute the same (then nothing
            is left of it).
    """
    if model.lora is None:
        raise ValueError("this model has no adapter to merge; make it with a LoraSpec")
    if dtype is not None and dtype not in ROUNDING:
        raise ValueError(f"weights can be written as {', '.join(ROUNDING)}, found {dtype!r}")
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, found {max_shard_bytes}")
    plain, scale = model.without_lora(), model.lora.scale
    with new_folder(folder) as partial_folder:
        plan = plan_merged(source, model, adapter, dtype=dtype, max_shard_bytes=max_shard_bytes)
        params = load_params(source, plain)
        expected = probe_logits(model, {**params, **adapter})
        effect = _gap(probe_logits(plain, params), expected)
        _merge_in_place(params, adapter, scale)
        _check(folder, "merged", _gap(probe_logits(plain, params), expected), TOLERANCE[model.dtype], effect)
        del params
        write_merged(partial_folder, source, plan, adapter, scale, dtype=dtype)
        check_merged(partial_folder, plan, adapter, scale)
        gap = _gap(probe_logits(plain, load_params(partial_folder, plain)), expected)
        coarsest = max(
            (tensor.dtype for tensors in plan.values() for tensor in tensors if tensor.adapted), key=ROUNDING.get
        )
        tolerance = TOLERANCE[model.dtype] + ROUNDING[coarsest]
        _check(folder, "read again", gap, tolerance, effect)
        return Exported(_sizes(partial_folder), gap, effect, tolerance, None if coarsest == "float32" else coarsest)
