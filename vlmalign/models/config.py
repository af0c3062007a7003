"""Sizes and settings of a model, in one vocabulary for all families. Families translate `config.json` into these."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the rotary wavelengths: long ones divided by the factor, short ones kept, a ramp between."""

    low: float  #: wavelengths above `original` / low are stretched in full
    high: float  #: wavelengths below `original` / high are kept
    original: int  #: context length of pretraining, tokens


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one kind of layer: frequencies `theta^(-2i/h) / factor`, unless `llama3` shapes the factor.

    With `sections` (M-RoPE) positions are triples (time, row, column): frequency i turns by the coordinate whose
    section it lies in, sections counted in frequencies.
    """

    theta: float
    factor: float = 1.0
    llama3: Llama3Scaling | None = None
    sections: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class LayerSpec:
    """What may differ from layer to layer."""

    rope: Rope
    window: int | None  #: tokens a local layer looks back, the current one included; None = global


@dataclass(frozen=True)
class DecoderConfig:
    """A causal decoder: pre-norm residual blocks of grouped-query attention and a gated feed-forward."""

    vocab: int
    embed: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    norm_offset: float  #: RMSNorm multiplies by (offset + weight): 1 for Gemma, 0 for Llama
    sandwich_norm: bool  #: also normalise each block's output before it joins the residual stream
    qk_norm: bool  #: RMSNorm over head_dim on queries and keys, before the rotary embedding
    qkv_bias: bool
    out_bias: bool  #: of the attention's output projection
    ffn_bias: bool
    activation: str  #: of the gate: "gelu_tanh" or "silu"
    query_scale: float  #: multiplies queries, usually head_dim ** -0.5
    embed_scale: float  #: multiplies token embeddings (not image features)
    tied_head: bool  #: the output head is the embedding table
    logit_softcap: float | None = None  #: z -> cap * tanh(z / cap) on output logits

    @property
    def widest_input(self) -> int:
        """Of all projections, the most numbers that one takes."""
        return max(self.embed, self.heads * self.head_dim, self.ffn)

    @property
    def position_axes(self) -> int:
        """Coordinates of a rotary position: 1, or 3 (time, row, column) under M-RoPE."""
        return 3 if any(spec.rope.sections for spec in self.layers) else 1


@dataclass(frozen=True)
class SiglipConfig:
    """A SigLIP tower and the projector that turns its patches into `tokens` soft tokens of the decoder."""

    embed: int
    ffn: int
    layers: int
    heads: int
    image_size: int  #: pixels per side
    patch: int  #: pixels per side of a patch
    channels: int
    norm_eps: float
    tokens: int  #: soft tokens per image after pooling
    has_pooling_head: bool  #: the checkpoint carries an attention-pooling head that this model does not use

    @property
    def grid(self) -> int:
        """Patches per side."""
        return self.image_size // self.patch


@dataclass(frozen=True)
class QwenVisionConfig:
    """The tower of Qwen2.5-VL, for images of any size; `out` is the decoder's width."""

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

    @property
    def tokens(self) -> None:
        """Soft tokens per image: not one number, they follow from the size of the image."""
        return None


@dataclass(frozen=True)
class ImageTokens:
    """The ids around and inside an image, and whether its soft tokens see each other in both directions."""

    soft: int  #: id standing at every soft token
    begin: int
    end: int
    bidirectional: bool


@dataclass(frozen=True)
class ModelConfig:
    """A whole model. `family` names its entry in `families.FAMILIES`."""

    family: str
    decoder: DecoderConfig
    vision: SiglipConfig | QwenVisionConfig | None
    image_tokens: ImageTokens | None
