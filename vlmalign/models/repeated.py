"""Modules that differ in nothing but their parameters, traced once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx
from jax import jit

from vlmalign.shapes import Array


def each_kind_once(call: Callable[..., Array]) -> Callable[..., Array]:
    """`call(module, *arguments)`, traced once for all modules of a kind and all arguments of the same shapes.

    For use within a traced function. A deep model repeats a layer or two: gradients of MedGemma-4B took 24 to 32 s to
    trace with each of its 34 layers traced, and 4 to 6 s so. The compiler puts the traced layer in place of every call:
    the program is that of the plain loop. What `call` closes over is the same for every module: make the function anew
    in every trace that has other values.
    """
    traced: dict[nnx.GraphDef, Callable[..., Array]] = {}

    def once(module: nnx.Module, *arguments: Any) -> Array:
        graph, parameters = nnx.split(module)
        if graph not in traced:
            traced[graph] = jit(lambda parameters, *arguments: call(nnx.merge(graph, parameters), *arguments))
        return traced[graph](parameters, *arguments)

    return once
