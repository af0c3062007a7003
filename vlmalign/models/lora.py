"""Low-rank adapters: which projections carry one, its first values, and merging it into a copy of the base."""

from __future__ import annotations

import difflib
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Float, Key

#: the last part of a DoRA vector's name
MAGNITUDE = ".lora_magnitude_vector"

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
ATTENTION_AND_FEED_FORWARD = ATTENTION + FEED_FORWARD


@dataclass(frozen=True)
class LoraSpec:
    """An adapter on the language model: `targets` are names of projections, applied in every decoder layer.

    Raises:
        ValueError: for a target that names no projection (with the nearest that do) and values out of range.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ATTENTION_AND_FEED_FORWARD
    rank_stabilised: bool = False  #: rsLoRA: scale alpha / sqrt(rank) instead of alpha / rank
    magnitude: bool = False  #: DoRA: a trained length for each output
    dropout: float = 0.0  #: share of the adapter's inputs dropped in training, in [0, 1)

    def __post_init__(self) -> None:
        known = ", ".join(ATTENTION_AND_FEED_FORWARD)
        # A bare string is a mistake that iteration would hide: its letters would be taken for names.
        if isinstance(self.targets, str) or not self.targets:
            raise ValueError(
                f"LoRA targets must be a list of names among {known}; found {self.targets!r}"
                + (_advice(self.targets) if self.targets else "")
            )
        strange = [target for target in self.targets if target not in ATTENTION_AND_FEED_FORWARD]
        if strange:
            raise ValueError(
                f"LoRA targets must be among {known}; "
                + "; ".join(f"{target!r} would match nothing{_advice(target)}" for target in strange)
            )
        if self.rank < 1:
            raise ValueError(f"LoRA needs rank >= 1, found {self.rank}")
        if not (self.alpha > 0 and math.isfinite(self.alpha)):
            raise ValueError(f"LoRA needs a finite alpha > 0, found {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA needs a dropout in [0, 1), found {self.dropout}")

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


#: how others call projections that are several of ours, or none
ELSEWHERE = {
    "qkv_proj": ATTENTION[:3],
    "query_key_value": ATTENTION[:3],
    "c_attn": ATTENTION[:3],
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "dense": ("o_proj",),
    "out_proj": ("o_proj",),
    "gate_up_proj": FEED_FORWARD[:2],
    "attention": ATTENTION,
    "self_attn": ATTENTION,
    "attn": ATTENTION,
    "mlp": FEED_FORWARD,
    "all-linear": ATTENTION_AND_FEED_FORWARD,
}


def nearest_targets(target: str) -> tuple[str, ...]:
    """The projections that somebody who wrote `target` may have meant: a name of PEFT's or another model's, a path, a
    regular expression over paths, or a slip of the pen.

    >>> nearest_targets("qkv_proj"), nearest_targets(r".*\\.(q|v)_proj"), nearest_targets("up_porj")
    (('q_proj', 'k_proj', 'v_proj'), ('q_proj', 'v_proj'), ('up_proj',))
    """
    last = target.rpartition(".")[2]
    if last in ELSEWHERE:
        return ELSEWHERE[last]
    if last in ATTENTION_AND_FEED_FORWARD:
        return (last,)
    try:
        pattern = re.compile(target)
    except re.error:
        pattern = None
    if pattern is not None:
        paths = {name: f"model.layers.0.self_attn.{name}" for name in ATTENTION}
        paths |= {name: f"model.layers.0.mlp.{name}" for name in FEED_FORWARD}
        meant = tuple(name for name, path in paths.items() if pattern.fullmatch(path))
        if meant:
            return meant
    return tuple(difflib.get_close_matches(last, ATTENTION_AND_FEED_FORWARD, n=1))


def _advice(target: str) -> str:
    """The end of an error about a wrong target: why, and what to write."""
    if re.search(r"lm_head|embed", target):
        return " (only the decoder's projections carry an adapter, not embeddings or the output head)"
    if re.search(r"vision|visual|multi_modal|fc[12]$|attn\.proj$", target):
        return " (only the decoder carries an adapter, never the vision tower)"
    near = nearest_targets(target)
    return f" (write {', '.join(near)})" if near else ""


def is_adapter(name: str) -> bool:
    """True for the parameters an adapter adds."""
    return ".lora_A." in name or ".lora_B." in name or name.endswith(MAGNITUDE)


def init_adapter(
    shapes: Mapping[str, jax.ShapeDtypeStruct], base: Mapping[str, Array], *, key: Key[Array, ""]
) -> dict[str, Array]:
    """First values: A normal with standard deviation 1/sqrt(in), B zero, DoRA's lengths those of the base's outputs,
    so the adapted model equals its base.

    Each tensor's key is derived from its name: adding a target does not change the values of the others.
    """

    def one(name: str, shape: jax.ShapeDtypeStruct) -> Array:
        if ".lora_B." in name:
            return jnp.zeros(shape.shape, shape.dtype)
        if name.endswith(MAGNITUDE):
            weight = base[name.removesuffix(MAGNITUDE) + ".weight"].astype(jnp.float32)
            return jnp.sqrt(jnp.sum(weight * weight, axis=1))
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return jax.random.normal(own, shape.shape, shape.dtype) * shape.shape[1] ** -0.5

    return {name: one(name, shape) for name, shape in shapes.items() if is_adapter(name)}


def merge_adapter(base: Mapping[str, Array], adapter: Mapping[str, Array], scale: float) -> dict[str, Array]:
    """The base with the adapted matrix in place of each W, taken in float32. A copy: `base` stands.

    Every tensor but the adapted ones is the base's own.
    """
    merged = dict(base)
    for name, a in adapter.items():
        if ".lora_A." in name:
            target = name.replace(".lora_A.", ".")
            length = adapter.get(target.removesuffix(".weight") + MAGNITUDE)
            merged[target] = merge_matrix(base[target], a, adapter[name.replace(".lora_A.", ".lora_B.")], length, scale)
    return merged


def merge_matrix(
    weight: Float[Array, "out in"],
    a: Float[Array, "rank in"],
    b: Float[Array, "out rank"],
    length: Float[Array, "out"] | None,
    scale: float,
) -> Float[Array, "out in"]:
    """W + scale B A (Hu et al., arXiv 2106.09685, eq. 3), in the dtype of W; with DoRA's `length` m, m times that over
    its norm along each output's inputs (arXiv 2402.09353, eq. 5). Taken in float32 and rounded once.
    """
    wide = weight.astype(jnp.float32) + scale * jnp.einsum(
        "or,ri->oi", b, a, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
    )
    if length is not None:
        wide = wide * (length / jnp.sqrt(jnp.sum(wide * wide, axis=1)))[:, None]
    return wide.astype(weight.dtype)
