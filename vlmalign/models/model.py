"""A model as pure functions of a flat dictionary of parameters: images -> features, groups -> states.

Parameters are `dict[str, Array]`, named as in the checkpoint, at every boundary: what is trained and what is frozen
are two such dictionaries. The NNX module exists only while a function is traced.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import nnx

from vlmalign.models.attention import KeyValue, Places, group_attention, resolve_attention
from vlmalign.models.config import ModelConfig
from vlmalign.models.dropout import token_noise
from vlmalign.models.linear import Linear
from vlmalign.models.lora import LoraSpec
from vlmalign.models.network import Network
from vlmalign.models.towers import Pixels
from vlmalign.shapes import Array, Float, Key
from vlmalign.types import GroupBatch

log = logging.getLogger(__name__)

Params = Mapping[str, Array]

#: of base parameters and activations; Gemma 3's activations overflow float16
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class Model:
    """Configuration and choices; holds no weights. With `lora`, the parameters include the adapter's."""

    config: ModelConfig
    lora: LoraSpec | None = None
    dtype: str = "float32"  #: of the base parameters and activations: float32 or bfloat16; adapters are float32
    attention: str = "auto"  #: "auto", or a name in `attention.IMPLEMENTATIONS`
    remat: str = "none"  #: what the backward pass makes again: a name in `decoder.REMAT`
    _logged: set = field(default_factory=set, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be {' or '.join(DTYPES)}, found {self.dtype!r}: activations of these models overflow float16"
            )

    @cached_property
    def _abstract(self) -> tuple[nnx.GraphDef, list]:
        network = Network(self.config, dtype=jnp.dtype(self.dtype), rngs=None)
        if self.lora is not None:
            for block in network.language_model.layers:
                for part, owner in (("self_attn", block.self_attn), ("mlp", block.mlp)):
                    for name, child in vars(owner).items():
                        if isinstance(child, Linear) and name in self.lora.targets:
                            child.add_lora(
                                path=f"{part}.{name}",
                                rank=self.lora.rank,
                                scale=self.lora.scale,
                                magnitude=self.lora.magnitude,
                                dtype=jnp.dtype("float32"),
                            )
        graph, state = nnx.split(network)
        return graph, list(nnx.to_flat_state(state))

    @cached_property
    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and dtype of every parameter."""
        return {_name(path): jax.ShapeDtypeStruct(v.shape, v.dtype) for path, v in self._abstract[1]}

    @cached_property
    def dims(self) -> dict[str, tuple[str, ...]]:
        """Logical dimension names of every parameter, from which shardings follow."""
        return {_name(path): v.get_metadata()["dims"] for path, v in self._abstract[1]}

    def without_lora(self) -> Model:
        """The same model without adapter parameters: the base, or a merged copy."""
        return self if self.lora is None else replace(self, lora=None)

    def init(self, key: Key[Array, ""]) -> dict[str, Array]:
        """Random parameters, for a model trained from nothing."""
        network = Network(self.config, dtype=jnp.dtype(self.dtype), rngs=nnx.Rngs(params=key))
        return {_name(path): v[...] for path, v in nnx.to_flat_state(nnx.split(network)[1])}

    def bind(self, params: Params) -> Network:
        """The network over these parameters; inside a traced function. Extra entries are an error."""
        graph, flat = self._abstract
        extra = set(params) - set(self.shapes)
        if extra:
            raise ValueError(f"parameters this model does not have: {', '.join(sorted(extra)[:5])}")
        return nnx.merge(graph, nnx.from_flat_state([(path, v.replace(params[_name(path)])) for path, v in flat]))

    def encode(self, params: Params, pixels: Pixels) -> Float[Array, "f embed"]:
        """Soft tokens of images, end to end: what `GroupBatch.features` holds."""
        return self.bind(params).encode(pixels)

    def hidden(
        self, params: Params, batch: GroupBatch, dropout: Key[Array, ""] | None = None
    ) -> Float[Array, "n t embed"]:
        """The state after every token, prompt included; padding rows hold finite garbage.

        With a key, inputs of the adapters are dropped at the adapter's rate: for supervised training only, since
        log-probabilities that are compared with others must be taken without.
        """
        network = self.bind(params)
        features = batch.features
        if features is None and batch.pixels is not None:
            features = network.encode(batch.pixels)
        x = network.embed(batch.tokens, batch.image, features)
        places = self.places(batch)
        choice = resolve_attention(
            self.attention, layout=batch.layout, head_dim=self.config.decoder.head_dim, dtype=x.dtype
        )
        if (batch.layout, choice) not in self._logged:
            self._logged.add((batch.layout, choice))
            log.info("attention %s for layout %s: %s", choice.name, batch.layout, choice.reason)

        def attend(q: Array, kv: KeyValue, window: int | None) -> Array:
            return group_attention(q, kv, places, batch.layout, window, name=choice.name)

        rate = 0.0 if self.lora is None else self.lora.dropout
        widest = self.config.decoder.widest_input
        noise = token_noise(dropout, batch, rate, size=widest) if dropout is not None and rate else None
        tables = network.language_model.tables(batch.position)
        return network.language_model(x, tables, attend, remat=self.remat, noise=noise)

    def places(self, batch: GroupBatch) -> Places:
        """Where tokens stand. Only some families let the tokens of one image see each other in both directions."""
        both_ways = self.config.image_tokens is not None and self.config.image_tokens.bidirectional
        return Places(batch.segment, batch.order, batch.block if both_ways else jnp.full_like(batch.block, -1))

    def states(
        self, params: Params, batch: GroupBatch, dropout: Key[Array, ""] | None = None
    ) -> Float[Array, "n k c embed"]:
        """The state that predicts each continuation token; the prompt's last state serves all K continuations."""
        return predictors(self.hidden(params, batch, dropout), batch)

    def head(self, params: Params) -> Float[Array, "vocab embed"]:
        """The output matrix for `token_logprobs`."""
        return params["language_model.embed_tokens.weight" if self.config.decoder.tied_head else "lm_head.weight"]


def predictors(hidden: Float[Array, "n t embed"], batch: GroupBatch) -> Float[Array, "n k c embed"]:
    """Shift `hidden` so that entry (k, c) is the state one token earlier on k's path."""
    prompt, group, completion = batch.layout
    n, _, embed = hidden.shape
    length = jnp.sum(batch.segment[:, :prompt] == 0, axis=1)  # [n] real prompt tokens
    last = jnp.take_along_axis(hidden, jnp.maximum(length - 1, 0)[:, None, None], axis=1)  # [n, 1, embed]
    own = hidden[:, prompt:].reshape(n, group, completion, embed)
    first = jnp.broadcast_to(last[:, None], (n, group, 1, embed))
    return jnp.concatenate([first, own[:, :, :-1]], axis=2)


def _name(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))
