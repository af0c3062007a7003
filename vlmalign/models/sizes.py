"""How large the parts of a model are: numbers in its matrices, bytes of its caches, operations of its tower."""

from __future__ import annotations

import jax.numpy as jnp

from vlmalign.models.config import DecoderConfig, ModelConfig
from vlmalign.models.model import Model


def layer_weights(config: DecoderConfig) -> int:
    """Numbers in the matrices of all layers."""
    attention = 2 * config.embed * config.head_dim * (config.heads + config.kv_heads)
    return len(config.layers) * (attention + 3 * config.embed * config.ffn)


def head_weights(config: DecoderConfig) -> int:
    """Numbers in the output matrix."""
    return config.vocab * config.embed


def cache_bytes(model: Model) -> int:
    """Keys and values of one token in all layers."""
    config = model.config.decoder
    return 2 * len(config.layers) * config.kv_heads * config.head_dim * jnp.dtype(model.dtype).itemsize


def siglip_flops(config: ModelConfig) -> int:
    """Operations of one image through the SigLIP tower and its projector; a product of m x k and k x n has 2 m k n."""
    vision = config.vision
    patches, width = vision.grid**2, vision.embed
    weights = vision.layers * (4 * width**2 + 2 * width * vision.ffn) + vision.channels * vision.patch**2 * width
    attention = 4 * vision.layers * patches**2 * width
    projector = 2 * vision.tokens * width * config.decoder.embed
    return 2 * patches * weights + attention + projector
