"""Weights in the order in which decoding reads them fastest.

Checkpoints store a matrix as [out, in]. With the few rows of a decode step, XLA's matrix product on a CPU takes about
1.4 times as long over [out, in] as over [in, out], so that there the matrices are turned once per rollout. On a GPU
both run at the speed of the memory, and the parameters are used as they are.
"""

from __future__ import annotations

import weakref

import jax
import numpy as np

from vlmalign.models.model import Model, Params
from vlmalign.models.network import Network
from vlmalign.shapes import Array, Float

#: marks a matrix that stands as [in, out]
TURNED = ".turned"
#: a model whose matrices take more than this is not copied
MOST_BYTES = 2 * 2**30

_turned: dict[int, tuple[weakref.ref, Array]] = {}


def decode_weights(model: Model, params: Params) -> dict[str, Array]:
    """What `bind_for_decoding` takes: the parameters, on a CPU with the decoder's matrices turned.

    The copy of a matrix lives as long as the matrix, so that what does not change between rollouts is turned once.
    Matrices that are turned already (`turned`) stay as they are.
    """
    if not is_turned_here(model, params):
        return dict(params)
    names = [name for name in params if _is_turned(model, name) and name + TURNED not in params]
    found = {name: value for name, value in params.items() if name not in names or _is_embedding(name)}
    return found | {name + TURNED: _turn(params[name]) for name in names}


def is_turned_here(model: Model, params: Params) -> bool:
    """Whether `decode_weights` turns matrices where these parameters live."""
    small = sum(value.nbytes for name, value in params.items() if _is_turned(model, name)) <= MOST_BYTES
    devices = {device for value in params.values() for device in value.sharding.device_set}
    return small and [device.platform for device in devices] == ["cpu"]


def turned(model: Model, params: Params) -> dict[str, Array]:
    """The parameters with their matrices turned, the embedding both ways if it is the output matrix too; inside a traced
    function that makes them anyway (a merge)."""
    names = {name for name in params if _is_turned(model, name)}
    found = {name: value for name, value in params.items() if name not in names or _is_embedding(name)}
    return found | {name + TURNED: params[name].T for name in names}


def bind_for_decoding(model: Model, params: Params) -> tuple[Network, Float[Array, "vocab embed"]]:
    """The network over `decode_weights` (or over plain parameters), and its output matrix; inside a traced function."""
    straight = {
        name.removesuffix(TURNED): value.T if name.endswith(TURNED) else value
        for name, value in params.items()
        if not (name.endswith(TURNED) and name.removesuffix(TURNED) in params)
    }
    head = "language_model.embed_tokens.weight" if model.config.decoder.tied_head else "lm_head.weight"
    turned = params.get(head + TURNED)
    return model.bind(straight), straight[head] if turned is None else turned.T


def _is_embedding(name: str) -> bool:
    """Rows of it are looked up: it must stand as it is, whether or not it is the output matrix too."""
    return name == "language_model.embed_tokens.weight"


def _is_turned(model: Model, name: str) -> bool:
    if _is_embedding(name):
        return model.config.decoder.tied_head
    return name == "lm_head.weight" or (name.startswith("language_model.layers.") and name.endswith("_proj.weight"))


def _turn(matrix: Float[Array, "out in"]) -> Float[Array, "in out"]:
    known = _turned.get(id(matrix))
    if known is not None and known[0]() is matrix:
        return known[1]
    number = id(matrix)
    # NumPy's copy: XLA would compile a program per shape.
    turned = jax.device_put(np.ascontiguousarray(np.asarray(matrix).T), matrix.sharding)
    _turned[number] = (weakref.ref(matrix, lambda _: _turned.pop(number, None)), turned)
    return turned
