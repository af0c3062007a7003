"""The vision tower of Qwen2.5-VL (arXiv 2502.13923): images of any size, attention within windows, a 2 x 2 merger.

An image is a grid of patches, height and width even. Four neighbouring patches (2 x 2) become one soft token of the
decoder. Most blocks attend within windows of `window` x `window` soft tokens, counted from the top left corner; those
listed in `full_blocks` attend over the whole image.

An image is laid out by window, [windows, slots], a slot for each patch that a whole window has (64): a window at the
right or lower edge leaves slots empty. So windows are plain batch rows, and nothing is masked but empty slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vlmalign.models.linear import Linear, init_normal
from vlmalign.models.norms import RMSNorm
from vlmalign.models.rope import rotate
from vlmalign.shapes import Array, Bool, Float, Int

THETA = 10_000.0
NORM_EPS = 1e-6


@dataclass(frozen=True)
class QwenVisionConfig:
    """Sizes of the tower; `out` is the decoder's width."""

    embed: int
    ffn: int
    layers: int
    heads: int
    patch: int  #: pixels per side of a patch
    frames: int  #: a still image is repeated this many times in time
    channels: int
    merge: int  #: patches per side of a soft token
    window: int  #: soft tokens per side of a window
    full_blocks: tuple[int, ...]
    out: int

    @property
    def slots(self) -> int:
        """Patches in a whole window."""
        return (self.window * self.merge) ** 2

    @property
    def patch_size(self) -> int:
        """Numbers in one patch: channels x frames x pixels."""
        return self.channels * self.frames * self.patch**2


class Windows(NamedTuple):
    """One image laid out by window: w windows of s slots; f soft tokens in raster order."""

    patches: Float[Array, "w s numbers"]
    position: Int[Array, "w s 2"]  #: row and column of each patch
    real: Bool[Array, "w s"]
    order: Int[Array, "f"]  #: place of each soft token among the w x (s / merge^2) merged ones


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


class PatchProjection(nnx.Module):
    """A convolution whose stride is its size, stored [embed, channel, frame, patch, patch]."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (config.embed, config.channels, config.frames, config.patch, config.patch)
        self.weight = nnx.Param(
            init_normal(rngs, shape, config.patch_size**-0.5, dtype),
            dims=("tower_embed", "channel", "frame", "patch", "patch"),
        )


class PatchEmbed(nnx.Module):
    """Patches to vectors: one matrix product."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.proj = PatchProjection(config, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "*batch numbers"]) -> Float[Array, "*batch embed"]:
        weight = self.proj.weight[...]
        return jnp.einsum("...i,oi->...o", patches.astype(weight.dtype), weight.reshape(weight.shape[0], -1))


class QwenTowerAttention(nnx.Module):
    """Attention within a window, or over all windows of the image."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.heads = config.heads
        self.qkv = Linear(
            config.embed, 3 * config.embed, dims=("heads", "tower_embed"), bias=True, dtype=dtype, rngs=rngs
        )
        self.proj = Linear(config.embed, config.embed, dims=("tower_embed", "heads"), bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "w s embed"], tables: tuple[Array, Array], real: Bool[Array, "w s"], *, full: bool
    ) -> Float[Array, "w s embed"]:
        w, s, _ = x.shape
        q, k, v = jnp.moveaxis(self.qkv(x).reshape(w, s, 3, self.heads, -1), 2, 0)  # [w, s, heads, h]
        # Positions turn in float32, as the reference does.
        q, k = (rotate(t.astype(jnp.float32), tables).astype(x.dtype) for t in (q, k))
        keys = real
        if full:
            q, k, v = (t.reshape(1, w * s, self.heads, -1) for t in (q, k, v))
            keys = real.reshape(1, w * s)
        out = jax.nn.dot_product_attention(q, k, v, mask=keys[:, None, None, :])
        return self.proj(out.reshape(x.shape))


class QwenTowerFeedForward(nnx.Module):
    """SiLU-gated, with biases."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        up, down = ("ffn", "tower_embed"), ("tower_embed", "ffn")
        self.gate_proj = Linear(config.embed, config.ffn, dims=up, bias=True, dtype=dtype, rngs=rngs)
        self.up_proj = Linear(config.embed, config.ffn, dims=up, bias=True, dtype=dtype, rngs=rngs)
        self.down_proj = Linear(config.ffn, config.embed, dims=down, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "w s embed"]) -> Float[Array, "w s embed"]:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class QwenTowerBlock(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (
            RMSNorm(config.embed, eps=NORM_EPS, offset=0.0, dtype=dtype, dim="tower_embed") for _ in range(2)
        )
        self.attn = QwenTowerAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = QwenTowerFeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "w s embed"], tables: tuple[Array, Array], real: Bool[Array, "w s"], *, full: bool
    ) -> Float[Array, "w s embed"]:
        x = x + self.attn(self.norm1(x), tables, real, full=full)
        return x + self.mlp(self.norm2(x))


class Merger(nnx.Module):
    """Four patches to one soft token: norm, concatenate, two layers with GELU. `mlp.0` and `mlp.2` as stored."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        wide = config.embed * config.merge**2
        self.ln_q = RMSNorm(config.embed, eps=NORM_EPS, offset=0.0, dtype=dtype, dim="tower_embed")
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
    """One image laid out by window -> its soft tokens in raster order."""

    def __init__(self, config: QwenVisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([QwenTowerBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])
        self.merger = Merger(config, dtype=dtype, rngs=rngs)

    def __call__(self, image: Windows) -> Float[Array, "f out"]:
        config = self.config
        x = self.patch_embed(image.patches)  # [w, s, embed]
        tables = axial_tables(image.position, config.embed // config.heads)
        for index, block in enumerate(self.blocks):
            with jax.named_scope(f"tower_{index}"):
                x = block(x, tables, image.real, full=index in config.full_blocks)
        merged = self.merger(x.reshape(-1, config.merge**2, config.embed))
        return jnp.take(merged, image.order, axis=0)


def axial_tables(
    position: Int[Array, "w s 2"], head_dim: int
) -> tuple[Float[Array, "w s half"], Float[Array, "w s half"]]:
    """Cosine and sine, float32: the first half of the pairs turns by the row, the second by the column."""
    quarter = np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    frequency = np.float32(1.0) / (np.float32(THETA) ** quarter)
    angle = (position[..., None].astype(jnp.float32) * frequency).reshape(*position.shape[:2], -1)
    return jnp.cos(angle), jnp.sin(angle)
