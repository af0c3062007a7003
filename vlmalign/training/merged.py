"""The policy as rollouts run it: one model without adapter, made of frozen and trained parameters once per rollout."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
from jax.sharding import Mesh

from vlmalign.mesh import on_mesh
from vlmalign.models.lora import is_adapter, merge_adapter
from vlmalign.models.model import Model, Params
from vlmalign.rollout.decode_weights import joined, joins_here, with_made
from vlmalign.shapes import Array
from vlmalign.training.value_head import split_value_head


def merged_policy(model: Model, base: Params, trained: Params) -> dict[str, Array]:
    """The parameters of `model` without its adapter: trained ones in place of the base's, in the model's dtypes."""
    policy, _ = split_value_head(trained)
    adapter = {name: value for name, value in policy.items() if is_adapter(name)}
    whole = {name: value.astype(model.shapes[name].dtype) for name, value in policy.items() if name not in adapter}
    together = {**base, **whole}
    return together if model.lora is None else merge_adapter(together, adapter, model.lora.scale)


def merge_program(
    model: Model, mesh: Mesh | None, sampling: Mesh | None, *, decodes: bool = True
) -> Callable[[Params, Params], dict[str, Array]]:
    """(frozen, trained) -> `merged_policy`, compiled; on the mesh of training, where its arguments live.

    Merged matrices come as rollouts on the mesh `sampling` read them fastest (`rollout.decode_weights`); with `decodes`
    False under their own names, as scoring reads them.
    """
    join = decodes and joins_here(mesh, sampling)
    compiled = on_mesh(jax.jit(partial(changed_parameters, model, join=join)), mesh)

    def merge(base: Params, trained: Params) -> dict[str, Array]:
        return with_made(model, base, compiled(base, trained))

    return merge


def changed_parameters(model: Model, base: Params, trained: Params, *, join: bool) -> dict[str, Array]:
    """What of `merged_policy` is not the base's own, with `join` joined; inside a traced function."""
    # What a compiled function gives back unchanged is a copy: of MedGemma-4B's tower and table, 2 GiB.
    found = {n: value for n, value in merged_policy(model, base, trained).items() if value is not base.get(n)}
    return joined(model, found) if join else found
