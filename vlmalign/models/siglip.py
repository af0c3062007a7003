"""The SigLIP vision tower (Zhai et al., arXiv 2303.15343) and the projector to the decoder's soft tokens.

Pixels are [image, channel, height, width], normalised by the checkpoint's processor.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlmalign.models.attention import attend_both_ways
from vlmalign.models.config import SiglipConfig
from vlmalign.models.initial import Rngs, init_constant, init_normal
from vlmalign.models.linear import Linear
from vlmalign.models.norms import LayerNorm, RMSNorm
from vlmalign.shapes import Array, Float


class PatchEmbedding(nnx.Module):
    """A strided convolution, stored [embed, channel, patch, patch] as in the checkpoint."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        shape = (config.embed, config.channels, config.patch, config.patch)
        std = (config.channels * config.patch**2) ** -0.5
        self.weight = nnx.Param(init_normal(rngs, shape, std, dtype), dims=("embed", "channel", "patch", "patch"))
        self.bias = nnx.Param(init_constant(rngs, (config.embed,), 0.0, dtype), dims=("embed",))


class PositionEmbedding(nnx.Module):
    """One learned vector per patch, [patches, embed]."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        shape = (config.grid**2, config.embed)
        self.weight = nnx.Param(init_normal(rngs, shape, config.embed**-0.5, dtype), dims=("patch", "embed"))


class Embeddings(nnx.Module):
    """Patches to vectors: the convolution written as one matrix product over flattened patches, plus positions."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.config = config
        self.patch_embedding = PatchEmbedding(config, dtype=dtype, rngs=rngs)
        self.position_embedding = PositionEmbedding(config, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Float[Array, "i channel height width"]) -> Float[Array, "i patches embed"]:
        c = self.config
        weight = self.patch_embedding.weight[...]
        patches = pixels.astype(weight.dtype).reshape(-1, c.channels, c.grid, c.patch, c.grid, c.patch)
        vectors = jnp.einsum("icypxq,vcpq->iyxv", patches, weight).reshape(-1, c.grid**2, c.embed)
        return vectors + self.patch_embedding.bias[...] + self.position_embedding.weight[...]


class TowerAttention(nnx.Module):
    """Full attention between the patches of one image."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.heads = config.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(config.embed, config.embed, dims=dims, bias=True, dtype=dtype, rngs=rngs)
            for dims in (("heads", "embed"),) * 3 + (("embed", "heads"),)
        )

    def __call__(self, x: Float[Array, "i patches embed"]) -> Float[Array, "i patches embed"]:
        shape = (*x.shape[:2], self.heads, -1)
        q, k, v = (proj(x).reshape(shape) for proj in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attend_both_ways(q, k, v).reshape(x.shape))


class TowerFeedForward(nnx.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.fc1 = Linear(config.embed, config.ffn, dims=("ffn", "embed"), bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(config.ffn, config.embed, dims=("embed", "ffn"), bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "i patches embed"]) -> Float[Array, "i patches embed"]:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class TowerBlock(nnx.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.layer_norm1 = LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype, dim="embed", rngs=rngs)
        self.self_attn = TowerAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm2 = LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype, dim="embed", rngs=rngs)
        self.mlp = TowerFeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "i patches embed"]) -> Float[Array, "i patches embed"]:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """The stack of blocks."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.layers = nnx.List([TowerBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.layers)])


class SiglipTower(nnx.Module):
    """Pixels to patch states after the last norm. The checkpoint's attention-pooling head, if any, is not used."""

    def __init__(self, config: SiglipConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.embeddings = Embeddings(config, dtype=dtype, rngs=rngs)
        self.encoder = Encoder(config, dtype=dtype, rngs=rngs)
        self.post_layernorm = LayerNorm(config.embed, eps=config.norm_eps, dtype=dtype, dim="embed", rngs=rngs)

    def __call__(self, pixels: Float[Array, "i channel height width"]) -> Float[Array, "i patches embed"]:
        x = self.embeddings(pixels)
        for index, block in enumerate(self.encoder.layers):
            with jax.named_scope(f"tower_{index}"):
                x = block(x)
        return self.post_layernorm(x)


class Projector(nnx.Module):
    """Average-pool the patch grid to `tokens` cells, RMSNorm, then a bare [tower, decoder] matrix (Gemma 3)."""

    def __init__(self, config: SiglipConfig, embed: int, *, dtype: jnp.dtype, rngs: Rngs):
        self.config = config
        self.mm_input_projection_weight = nnx.Param(
            init_normal(rngs, (config.embed, embed), config.embed**-0.5, dtype), dims=("tower_embed", "embed")
        )
        self.mm_soft_emb_norm = RMSNorm(
            config.embed, eps=config.norm_eps, offset=1.0, dtype=dtype, dim="tower_embed", rngs=rngs
        )

    def __call__(self, patches: Float[Array, "i patches tower"]) -> Float[Array, "i tokens embed"]:
        c = self.config
        side = round(c.tokens**0.5)
        cell = c.grid // side
        pooled = patches.reshape(-1, side, cell, side, cell, c.embed).mean(axis=(2, 4)).reshape(-1, c.tokens, c.embed)
        return jnp.einsum("itv,ve->ite", self.mm_soft_emb_norm(pooled), self.mm_input_projection_weight[...])
