"""Weights in the form in which decoding reads them fastest.

A decoded token reads every weight and computes little with each, so that what an operation costs beside its reading
counts. Where a copy of the weights is made anyway (a merge), matrices that multiply the same states are joined into one,
`qkv_proj` and `gate_up_proj`: four products a layer in place of seven.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TypeVar

import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from vlmalign.mesh import cuts_weights
from vlmalign.models.model import Model, Params
from vlmalign.models.network import Network
from vlmalign.shapes import Array

Value = TypeVar("Value")

#: (module of a layer, joined matrix, its parts from the first row on)
JOINED = (
    ("self_attn", "qkv_proj", ("q_proj", "k_proj", "v_proj")),
    ("mlp", "gate_up_proj", ("gate_proj", "up_proj")),
)


def joins_here(training: Mesh | AbstractMesh | None, sampling: Mesh | AbstractMesh | None) -> bool:
    """Whether matrices may stand joined: not where a device holds but a part of them, since parts are cut by heads."""
    return not (cuts_weights(training) or cuts_weights(sampling))


def joined(model: Model, params: Params) -> dict[str, Array]:
    """The parameters with those matrices joined whose parts are all among them; inside a traced function."""
    found = dict(params)
    for name, parts in _joins(model):
        if all(part in found for part in parts):
            found[name] = jnp.concatenate([found.pop(part) for part in parts])
    return found


def with_made(model: Model, base: Mapping[str, Value], made: Mapping[str, Value]) -> dict[str, Value]:
    """Parameters, or their shapes: `made`, as `joined` leaves it, and what it does not stand for of `base`."""
    parts = {part for name, parts in _joins(model) if name in made for part in parts}
    return {name: value for name, value in base.items() if name not in parts} | dict(made)


def bind_for_decoding(model: Model, params: Params) -> Network:
    """The network over these parameters, joined or not; inside a traced function."""
    plain, whole = dict(params), {}
    for name, parts in _joins(model):
        if name in plain:
            whole[name] = plain.pop(name)
            ends = np.cumsum([model.shapes[part].shape[0] for part in parts])[:-1]
            # Nothing reads these, and so nothing makes them.
            plain |= dict(zip(parts, jnp.split(whole[name], ends), strict=True))
    network = model.bind(plain)
    for index, block in enumerate(network.language_model.layers):
        names = {module: _name(index, module, name) for module, name, _ in JOINED}
        block.decode_with({module: whole[name] for module, name in names.items() if name in whole})
    return network


def _joins(model: Model) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(name of a joined matrix, names of its parts)."""
    for index in range(len(model.config.decoder.layers)):
        for module, name, parts in JOINED:
            yield _name(index, module, name), tuple(_name(index, module, part) for part in parts)


def _name(layer: int, module: str, matrix: str) -> str:
    return f"language_model.layers.{layer}.{module}.{matrix}.weight"
