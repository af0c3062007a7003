"""Low-rank adapters: which projections carry one, its first values, and merging it into a copy of the base."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vlmalign.shapes import Array, Key

#: the last part of a DoRA vector's name
MAGNITUDE = ".lora_magnitude_vector"

ATTENTION_AND_FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LoraSpec:
    """An adapter on the language model: `targets` are names of projections, applied in every decoder layer."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ATTENTION_AND_FEED_FORWARD
    rank_stabilised: bool = False  #: rsLoRA: scale alpha / sqrt(rank) instead of alpha / rank
    magnitude: bool = False  #: DoRA: a trained length for each output

    def __post_init__(self) -> None:
        unknown = set(self.targets) - set(ATTENTION_AND_FEED_FORWARD)
        if self.rank < 1 or unknown or not self.targets:
            raise ValueError(
                f"LoRA needs rank >= 1 and targets among {', '.join(ATTENTION_AND_FEED_FORWARD)}; "
                f"found rank {self.rank}, targets {', '.join(self.targets) or 'none'}"
            )

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)


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

    W + scale B A, and for DoRA m (W + scale B A) / |W + scale B A|, the norm over each output's inputs.
    """
    merged = dict(base)
    for name, a in adapter.items():
        if ".lora_A." not in name:
            continue
        b = adapter[name.replace(".lora_A.", ".lora_B.")]
        target = name.replace(".lora_A.", ".")
        wide = base[target].astype(jnp.float32) + scale * jnp.einsum(
            "or,ri->oi", b, a, preferred_element_type=jnp.float32, precision=jax.lax.Precision.HIGHEST
        )
        length = adapter.get(target.removesuffix(".weight") + MAGNITUDE)
        if length is not None:
            wide = wide * (length / jnp.sqrt(jnp.sum(wide * wide, axis=1)))[:, None]
        merged[target] = wide.astype(base[target].dtype)
    return merged
