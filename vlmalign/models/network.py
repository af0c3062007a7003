"""The whole network as an NNX module: decoder, and for vision-language models the tower and its projector."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from vlmalign.models.config import ModelConfig, QwenVisionConfig, SiglipConfig
from vlmalign.models.decoder import Decoder
from vlmalign.models.initial import Rngs, init_normal
from vlmalign.models.linear import Matrix
from vlmalign.models.qwen_vision import QwenTower
from vlmalign.models.siglip import Projector, SiglipTower
from vlmalign.models.towers import Pixels
from vlmalign.shapes import Array, Float, Int

#: what the parameters of the decoder begin with: full fine-tuning trains those, not towers and projectors
DECODER = ("language_model.", "lm_head.")


class Network(nnx.Module):
    """Parameter paths: `language_model...`, `lm_head.weight`; a SigLIP tower is at `vision_tower...` with
    `multi_modal_projector...`, Qwen's at `visual...`."""

    def __init__(self, config: ModelConfig, *, dtype: jnp.dtype, rngs: Rngs):
        decoder = config.decoder
        self.config = config
        self.language_model = Decoder(decoder, dtype=dtype, rngs=rngs)
        self.vision_tower = nnx.data(None)
        self.multi_modal_projector = nnx.data(None)
        self.visual = nnx.data(None)
        self.lm_head = nnx.data(None)
        if isinstance(config.vision, QwenVisionConfig):
            self.visual = QwenTower(config.vision, dtype=dtype, rngs=rngs)
        elif isinstance(config.vision, SiglipConfig):
            self.vision_tower = SiglipTower(config.vision, dtype=dtype, rngs=rngs)
            self.multi_modal_projector = Projector(config.vision, decoder.embed, dtype=dtype, rngs=rngs)
        if not decoder.tied_head:
            shape = (decoder.vocab, decoder.embed)
            self.lm_head = Matrix(init_normal(rngs, shape, decoder.embed**-0.5, dtype), ("vocab", "embed"))

    def encode(self, pixels: Pixels) -> Float[Array, "f embed"]:
        """Soft tokens of images as `towers.arrange` lays them out, end to end."""
        with jax.named_scope("encode_images"):
            if self.visual is not None:
                return self.visual(pixels)
            features = self.multi_modal_projector(self.vision_tower(pixels))  # [i, tokens, embed]
            return features.reshape(-1, features.shape[-1])

    def embed(
        self, tokens: Int[Array, "*batch"], image: Int[Array, "*batch"], features: Float[Array, "f embed"] | None
    ) -> Float[Array, "*batch embed"]:
        """Token embeddings, with `features[image]` standing where `image` >= 0."""
        if features is None:
            return self.language_model.embed(tokens)
        # The id of a soft token may lie beyond the embedding table.
        text = self.language_model.embed(jnp.where(image >= 0, 0, tokens))
        soft = jnp.take(features, jnp.maximum(image, 0), axis=0).astype(text.dtype)
        return jnp.where((image >= 0)[..., None], soft, text)

    @property
    def head(self) -> Float[Array, "vocab embed"]:
        """The output matrix."""
        return self.language_model.embed_tokens.weight[...] if self.lm_head is None else self.lm_head.weight[...]
