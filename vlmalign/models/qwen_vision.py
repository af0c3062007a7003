"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): images of any size, attention within windows, a 2 x 2 merger.

An image is a grid of patches, height and width even. Four neighbouring patches (2 x 2) become one soft token of the
decoder. Most blocks attend within windows of `window` x `window` soft tokens, counted from the top left corner; those
listed in `full_blocks` attend over the whole image.

An image is laid out by window, [windows, slots], a slot for each patch that a whole window has (64): a window at the
right or lower edge leaves slots empty. So windows are plain batch rows, and nothing is masked but empty slots.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmalign.models.attention import attend_both_ways
from vlmalign.models.config import QwenVisionConfig
from vlmalign.models.initial import Rngs, init_normal
from vlmalign.models.linear import Linear
from vlmalign.models.norms import RMSNorm
from vlmalign.models.rope import rotate
from vlmalign.shapes import Array, Bool, Float, Int

THETA = 10_000.0
NORM_EPS = 1e-6


class Windows(NamedTuple):
    """Images laid out by window: w windows of s slots; f soft tokens, each image's in raster order.

    One image has no leading axis; several (`stack`) have an axis of images in front of all but `order`.
    """

    patches: Float[Array, "*i w s numbers"]
    position: Int[Array, "*i w s 2"]  #: row and column of each patch
    real: Bool[Array, "*i w s"]
    order: Int[Array, "f"]  #: place of each soft token among the i x w x (s / merge^2) merged ones


def lay_out(patches: Float[np.ndarray, "patches numbers"], grid: tuple[int, int], config: QwenVisionConfig) -> Windows:
    """One image in the processor's patch order (2 x 2 blocks in raster order) as windows; `grid` counts patches."""
    rows, columns = grid[0] // config.merge, grid[1] // config.merge
    unit, side = config.merge**2, config.window
    high, wide = -(-rows // side), -(-columns // side)
    # Soft token (r, c) stands in window (r // side, c // side), at (r % side, c % side) of it.
    r, c = np.divmod(np.arange(rows * columns), columns)
    window = (r // side) * wide + c // side
    # Real tokens come first in a window, in raster order; a narrow window's rows are not padded one by one.
    width = np.minimum(side, columns - (c // side) * side)
    order = window * side**2 + (r % side) * width + c % side
    shape = (high * wide * side**2, unit)
    placed = np.zeros((*shape, patches.shape[-1]), patches.dtype)
    placed[order] = patches.reshape(rows * columns, unit, -1)
    position = np.zeros((*shape, 2), np.int32)
    inner = np.stack(np.divmod(np.arange(unit), config.merge), axis=-1)
    position[order] = np.stack([r, c], axis=-1)[:, None] * config.merge + inner
    real = np.zeros(shape, bool)
    real[order] = True
    layout = (high * wide, config.slots)
    return Windows(
        placed.reshape(*layout, -1), position.reshape(*layout, 2), real.reshape(layout), order.astype(np.int32)
    )


def stack(images: list[Windows], config: QwenVisionConfig, *, windows: int) -> Windows:
    """Images side by side, each padded to `windows` windows; `order` runs through all of them, padded to its bound."""

    def pad(x: np.ndarray, size: int) -> np.ndarray:
        return np.pad(x, [(0, size - x.shape[0])] + [(0, 0)] * (x.ndim - 1))

    merged = windows * config.window**2
    order = np.concatenate([image.order + i * merged for i, image in enumerate(images)])
    return Windows(
        *(
            np.stack([pad(getattr(image, name), windows) for image in images])
            for name in ("patches", "position", "real")
        ),
        pad(order, len(images) * merged),
    )


class PatchProjection(nnx.Module):
    """A convolution whose stride is its size, stored [embed, channel, frame, patch, patch]."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: Rngs):
        shape = (config.embed, config.channels, config.frames, config.patch, config.patch)
        self.weight = nnx.Param(
            init_normal(rngs, shape, config.patch_size**-0.5, dtype),
            dims=("tower_embed", "channel", "frame", "patch", "patch"),
        )


class PatchEmbed(nnx.Module):
    """Patches to vectors: one matrix product."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.proj = PatchProjection(config, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "*batch numbers"]) -> Float[Array, "*batch embed"]:
        weight = self.proj.weight[...]
        return jnp.einsum("...i,oi->...o", patches.astype(weight.dtype), weight.reshape(weight.shape[0], -1))


class QwenTowerAttention(nnx.Module):
    """Attention within a window, or over all windows of the image."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.heads = config.heads
        self.qkv = Linear(
            config.embed, 3 * config.embed, dims=("heads", "tower_embed"), bias=True, dtype=dtype, rngs=rngs
        )
        self.proj = Linear(config.embed, config.embed, dims=("tower_embed", "heads"), bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "i w s embed"], tables: tuple[Array, Array], real: Bool[Array, "i w s"], *, full: bool
    ) -> Float[Array, "i w s embed"]:
        i, w, s, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(i, w, s, 3, self.heads, -1), 3, 0)  # [i, w, s, heads, h]
        # Positions turn in float32, as the reference does.
        q, k = (rotate(t.astype(jnp.float32), tables).astype(x.dtype) for t in (q, k))
        rows = (i, w * s) if full else (i * w, s)
        q, k, v = (t.reshape(*rows, self.heads, -1) for t in (q, k, v))
        return self.proj(attend_both_ways(q, k, v, real.reshape(rows)).reshape(x.shape))


class QwenTowerFeedForward(nnx.Module):
    """SiLU-gated, with biases."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: Rngs):
        up, down = ("ffn", "tower_embed"), ("tower_embed", "ffn")
        self.gate_proj = Linear(config.embed, config.ffn, dims=up, bias=True, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(config.embed, config.ffn, dims=up, bias=True, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(config.ffn, config.embed, dims=down, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "i w s embed"]) -> Float[Array, "i w s embed"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class QwenTowerBlock(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.norm1, self.norm2 = (
            RMSNorm(config.embed, eps=NORM_EPS, offset=0.0, dtype=dtype, dim="tower_embed", rngs=rngs) for _ in range(2)
        )
        self.attn = QwenTowerAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = QwenTowerFeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "i w s embed"], tables: tuple[Array, Array], real: Bool[Array, "i w s"], *, full: bool
    ) -> Float[Array, "i w s embed"]:
        x = x + self.attn(self.norm1(x), tables, real, full=full)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """Four patches to one soft token: norm, concatenate, two layers with GELU. `mlp.0` and `mlp.2` as stored."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: Rngs):
        wide = config.embed * config.merge**2
        self.ln_q = RMSNorm(config.embed, eps=NORM_EPS, offset=0.0, dtype=dtype, dim="tower_embed", rngs=rngs)
        self.mlp = nnx.Dict(
            {
                "0": Linear(wide, wide, dims=("merged", "merged"), bias=True, dtype=dtype, rngs=rngs),
                "2": Linear(wide, config.out, dims=("embed", "merged"), bias=True, dtype=dtype, rngs=rngs),
            }
        )

    def __call__(self, x: Float[Array, "tokens unit embed"]) -> Float[Array, "tokens out"]:
        x = self.ln_q(x).reshape(x.shape[0], -1)
        return self.mlp["2"](jax.nn.gelu(self.mlp["0"](x), approximate=False))


class QwenTower(nnx.Module):
    """Images laid out by window -> their soft tokens, end to end."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([QwenTowerBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.merger = Merger(config, dtype=dtype, rngs=rngs)

    def __call__(self, images: Windows) -> Float[Array, "f out"]:
        config = self.config
        x = self.patch_embed(images.patches)  # [i, w, s, embed]
        tables = axial_tables(images.position, config.embed // config.heads)
        for index, block in enumerate(self.blocks):
            with jax.named_scope(f"tower_{index}"):
                x = block(x, tables, images.real, full=index in config.full_blocks)
        merged = self.merger(x.reshape(-1, config.merge**2, config.embed))
        return jnp.take(merged, images.order, axis=0)


def axial_tables(
    position: Int[Array, "i w s 2"], head_dim: int
) -> tuple[Float[Array, "i w s half"], Float[Array, "i w s half"]]:
    """Cosine and sine, float32: the first half of the pairs turns by the row, the second by the column."""
    quarter = np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    frequency = np.float32(1.0) / (np.float32(THETA) ** quarter)
    angle = (position[..., None].astype(jnp.float32) * frequency).reshape(*position.shape[:3], -1)
    return jnp.cos(angle), jnp.sin(angle)
