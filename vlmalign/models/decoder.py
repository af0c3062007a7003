"""The text decoder: residual blocks whose attention is handed in, so training, prefill and decode share the layers.

Parameter paths are the checkpoint's own names (`layers.0.self_attn.q_proj.weight`); layers are unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vlmalign.mesh import ROWS, constrain
from vlmalign.models.attention import KeyValue
from vlmalign.models.config import DecoderConfig, LayerSpec
from vlmalign.models.dropout import Noise
from vlmalign.models.initial import Rngs, init_normal
from vlmalign.models.linear import PRODUCT, Linear, joined_product
from vlmalign.models.norms import RMSNorm
from vlmalign.models.product import wide
from vlmalign.models.repeated import each_kind_once
from vlmalign.models.rope import rotary_tables, rotate
from vlmalign.shapes import Array, Float, Int

#: of each layer: cosines and sines of its rotary embedding (`rotary_tables`), [n, t, head_dim / 2]
Tables = list[tuple[Array, Array]]

ACTIVATIONS = {"gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True), "silu": jax.nn.silu}


@runtime_checkable
class Attend(Protocol):
    """Where keys come from: the group's own row, a prefill that records them, or a decode cache."""

    def __call__(self, q: Array, kv: KeyValue, window: int | None) -> Array:
        """Attention output [n, q, heads, h] of scaled queries [n, q, heads, h] and this row's keys and values [n, t, ...].

        There are as many queries as tokens, or one where only the state at one token is wanted.
        """
        ...


class Attention(nnx.Module):
    """Grouped-query attention projections; the attention itself is `attend`."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, *, dtype: jnp.dtype, rngs: Rngs):
        self.config, self.spec = config, spec
        width, kv_width = config.heads * config.head_dim, config.kv_heads * config.head_dim
        bias = config.qkv_bias
        self.q_proj = Linear(config.embed, width, dims=("heads", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(config.embed, kv_width, dims=("kv_heads", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(config.embed, kv_width, dims=("kv_heads", "embed"), bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(width, config.embed, dims=("embed", "heads"), bias=config.out_bias, dtype=dtype, rngs=rngs)
        self.q_norm, self.k_norm = (
            nnx.data(
                RMSNorm(
                    config.head_dim,
                    eps=config.norm_eps,
                    offset=config.norm_offset,
                    dtype=dtype,
                    dim="head_dim",
                    rngs=rngs,
                )
                if config.qk_norm
                else None
            )
            for _ in range(2)
        )
        self.joined = nnx.data(None)  #: q_proj, k_proj and v_proj as one matrix, where rollouts have it

    def __call__(
        self,
        x: Float[Array, "n t embed"],
        tables: tuple[Array, Array],
        attend: Attend,
        noise: Noise | None,
        only: Int[Array, "n"] | None = None,
    ) -> Float[Array, "n q embed"]:
        """With `only`, what the token at this index of each row sees: one query per row."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        made = _products(x, (self.q_proj, self.k_proj, self.v_proj), self.joined, noise)
        q, k, v = (y.reshape(shape) for y in made)  # [n, t, heads, h]
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, tables) * self.config.query_scale, rotate(k, tables)
        q = at(q, only)
        out = attend(q, KeyValue(k, v), self.spec.window)
        return self.o_proj(out.reshape(*q.shape[:2], -1), noise)


def at(x: Float[Array, "n t *rest"], only: Int[Array, "n"] | None) -> Float[Array, "n q *rest"]:
    """Of each row, what stands at its index, [n, 1, ...]; without indices, `x` itself."""
    if only is None:
        return x
    return jnp.take_along_axis(x, only.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def _products(x: Array, parts: tuple[Linear, ...], joined: Array | None, noise: Noise | None) -> tuple[Array, ...]:
    """What each map makes of the same x; in one product where their matrices stand joined, which adapters never do."""
    if joined is None:
        return tuple(part(x, noise) for part in parts)
    return joined_product(x, joined, parts)


def _plain_gated(gate: Array, up: Array, kind: str) -> Array:
    return ACTIVATIONS[kind](gate) * up


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def gated(gate: Float[Array, "*batch ffn"], up: Float[Array, "*batch ffn"], kind: str) -> Float[Array, "*batch ffn"]:
    """act(gate) * up. The backward pass keeps these two alone and works in float32 within one kernel: left to autodiff,
    a layer of MedGemma-4B keeps the activation's inner steps too, one of them in float32."""
    return _plain_gated(gate, up, kind)


def _gated_forward(gate: Array, up: Array, kind: str) -> tuple[Array, tuple[Array, Array]]:
    return _plain_gated(gate, up, kind), (gate, up)


def _gated_backward(kind: str, kept: tuple[Array, Array], out: Array) -> tuple[Array, Array]:
    gate, up, out = (x.astype(wide(x.dtype)) for x in (*kept, out))
    slopes = jax.vjp(lambda gate, up: _plain_gated(gate, up, kind), gate, up)[1](out)
    return tuple(slope.astype(value.dtype) for slope, value in zip(slopes, kept, strict=True))


gated.defvjp(_gated_forward, _gated_backward)


class FeedForward(nnx.Module):
    """down(act(gate(x)) * up(x)) (Shazeer, arXiv 2002.05202)."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.gate_proj = Linear(
            config.embed, config.ffn, dims=("ffn", "embed"), bias=config.ffn_bias, dtype=dtype, rngs=rngs
        )
        self.up_proj = Linear(
            config.embed, config.ffn, dims=("ffn", "embed"), bias=config.ffn_bias, dtype=dtype, rngs=rngs
        )
        self.down_proj = Linear(
            config.ffn, config.embed, dims=("embed", "ffn"), bias=config.ffn_bias, dtype=dtype, rngs=rngs
        )
        self.activation = config.activation
        self.joined = nnx.data(None)  #: gate_proj and up_proj as one matrix, where rollouts have it

    def __call__(self, x: Float[Array, "n t embed"], noise: Noise | None) -> Float[Array, "n t embed"]:
        gate, up = _products(x, (self.gate_proj, self.up_proj), self.joined, noise)
        return self.down_proj(gated(gate, up, self.activation), noise)


class Block(nnx.Module):
    """One decoder layer, with Gemma's sandwich norms where the family has them."""

    def __init__(self, config: DecoderConfig, spec: LayerSpec, *, dtype: jnp.dtype, rngs: Rngs):
        def norm() -> RMSNorm:
            return RMSNorm(
                config.embed, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype, dim="embed", rngs=rngs
            )

        self.self_attn = Attention(config, spec, dtype=dtype, rngs=rngs)
        self.mlp = FeedForward(config, dtype=dtype, rngs=rngs)
        self.input_layernorm = norm()
        self.post_attention_layernorm = norm()
        self.sandwich = config.sandwich_norm
        self.pre_feedforward_layernorm = nnx.data(norm() if self.sandwich else None)
        self.post_feedforward_layernorm = nnx.data(norm() if self.sandwich else None)

    def decode_with(self, joined: Mapping[str, Array]) -> None:
        """Multiply as decoding does; `joined`: "self_attn" or "mlp" -> the matrices that multiply its input, as one."""
        for name, module in (("self_attn", self.self_attn), ("mlp", self.mlp)):
            module.joined = nnx.data(joined.get(name))
            for linear in vars(module).values():
                if isinstance(linear, Linear):
                    linear.decoding = True

    def __call__(
        self,
        x: Float[Array, "n t embed"],
        tables: tuple[Array, Array],
        attend: Attend,
        noise: Noise | None,
        only: Int[Array, "n"] | None = None,
    ) -> Float[Array, "n q embed"]:
        """With `only`, the states at these tokens alone, one per row."""
        with jax.named_scope("attention"):
            out = self.self_attn(self.input_layernorm(x), tables, attend, noise, only)
            x = at(x, only) + (self.post_attention_layernorm(out) if self.sandwich else out)
        with jax.named_scope("feed_forward"):
            # Without sandwich norms, `post_attention_layernorm` is the norm before the feed-forward (Llama's name).
            before = self.pre_feedforward_layernorm if self.sandwich else self.post_attention_layernorm
            out = self.mlp(before(x), noise)
            return x + (self.post_feedforward_layernorm(out) if self.sandwich else out)


class Embedding(nnx.Module):
    """Token table [vocab, embed]."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.weight = nnx.Param(
            init_normal(rngs, (config.vocab, config.embed), config.embed**-0.5, dtype), dims=("vocab", "embed")
        )


class Decoder(nnx.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: DecoderConfig, *, dtype: jnp.dtype, rngs: Rngs):
        self.config = config
        self.embed_tokens = Embedding(config, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, spec, dtype=dtype, rngs=rngs) for spec in config.layers])
        self.norm = RMSNorm(
            config.embed, eps=config.norm_eps, offset=config.norm_offset, dtype=dtype, dim="embed", rngs=rngs
        )

    def embed(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """Scaled token embeddings; the scale is rounded to the parameters' dtype, as the checkpoints expect."""
        table = self.embed_tokens.weight[...]
        return jnp.take(table, tokens, axis=0) * jnp.asarray(self.config.embed_scale, table.dtype)

    def tables(self, position: Int[Array, "n t *axes"]) -> Tables:
        """What turns queries and keys at these positions: [n, t], or under M-RoPE [n, t, 3], where [n, t] stands for three
        equal coordinates (text)."""
        if self.config.position_axes == 3 and position.ndim == 2:
            position = jnp.broadcast_to(position[..., None], (*position.shape, 3))
        dtype = self.embed_tokens.weight.dtype
        ropes = {spec.rope for spec in self.config.layers}
        made = {rope: rotary_tables(position, rope, self.config.head_dim, dtype) for rope in ropes}
        return [made[spec.rope] for spec in self.config.layers]

    def __call__(
        self,
        x: Float[Array, "n t embed"],
        tables: Tables,
        attend: Attend,
        *,
        remat: str,
        noise: Noise | None = None,
    ) -> Float[Array, "n t embed"]:
        """States after the final norm. `tables` are those of the tokens' positions. `remat`, a name in `REMAT`: what the
        backward pass finds and what it makes again. `noise` drops inputs of the adapters.
        """

        @each_kind_once
        def run(block: Block, x: Array, tables: tuple[Array, Array], layer: Array) -> Array:
            own = None if noise is None else noise._replace(layer=layer)
            return REMAT[remat](lambda x: block(x, tables, ATTEND_AGAIN[remat](attend), own))(x)

        # Between layers states are cut by rows alone; left to itself the compiler would cut them by width as well.
        x = constrain(x, ROWS)
        for index, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{index}"):
                x = constrain(run(block, x, tables[index], index), ROWS)
        return self.norm(x)

    def with_caches(
        self,
        x: Float[Array, "n t embed"],
        tables: Tables,
        attend: Sequence[Attend],
        only: Int[Array, "n"] | None = None,
    ) -> Float[Array, "n q embed"]:
        """States after the final norm, in a rollout: every layer attends in its own way, to its own keys.

        With `only`, the state at this token of each row: the last layer makes no other. Where all tokens of a row
        stand at one position, `tables` of [n, 1, half] serve them.
        """
        x = constrain(x, ROWS)
        last = len(self.layers) - 1
        for index, (block, own) in enumerate(zip(self.layers, attend, strict=True)):
            with jax.named_scope(f"layer_{index}"):
                x = constrain(block(x, tables[index], own, None, only if index == last else None), ROWS)
        return self.norm(x)


#: what rematerialisation calls the result of attention
ATTENDED = "attended"


def _scores_made_again(attend: Attend) -> Attend:
    """While the feed-forward half of a recomputed layer runs backward, the attention scores of the other half would lie
    by: a tenth of a layer's memory at work, for 1 % of its operations."""

    def again(q: Array, kv: KeyValue, window: int | None) -> Array:
        out = jax.checkpoint(lambda q, kv: attend(q, kv, window))(q, kv)
        return checkpoint_name(out, ATTENDED)

    return again


def _keeping(*names: str) -> Callable[[Callable], Callable]:
    return partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(*names))


#: What is kept of a layer for the backward pass, from the most to the least: every activation; the results of linear
#: maps and of attention, from which the rest follows without a large product but the scores; the results of attention,
#: which leaves out their second half; nothing but the layer's input.
REMAT = {
    "none": lambda run: run,
    "dots": _keeping(PRODUCT, ATTENDED),
    "attention": _keeping(ATTENDED),
    "full": jax.checkpoint,
}
ATTEND_AGAIN = {"none": lambda attend: attend} | dict.fromkeys(("dots", "attention", "full"), _scores_made_again)
