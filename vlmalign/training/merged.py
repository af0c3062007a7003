"""The policy as rollouts run it: one model without adapter, made of frozen and trained parameters once per rollout."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from vlmalign.mesh import on_mesh
from vlmalign.models.lora import is_adapter, merge_adapter
from vlmalign.models.model import Model, Params
from vlmalign.rollout.decode_weights import TURNED, is_turned_here, turned
from vlmalign.shapes import Array
from vlmalign.training.value_head import split_value_head


def merged_policy(model: Model, base: Params, trained: Params) -> dict[str, Array]:
    """The parameters of `model` without its adapter: trained ones in place of the base's, in the model's dtypes."""
    policy, _ = split_value_head(trained)
    adapter = {name: value for name, value in policy.items() if is_adapter(name)}
    whole = {name: value.astype(model.shapes[name].dtype) for name, value in policy.items() if name not in adapter}
    together = {**base, **whole}
    return together if model.lora is None else merge_adapter(together, adapter, model.lora.scale)


def merge_program(model: Model, mesh: Mesh | None) -> Callable[[Params, Params], dict[str, Array]]:
    """(frozen, trained) -> `merged_policy`, compiled; on the mesh of training, where its arguments live.

    Where rollouts read turned matrices, merged ones come turned (`rollout.decode_weights`): made once, not copied.
    """

    def changed(base: Params, trained: Params, *, turn: bool) -> dict[str, Array]:
        # What a compiled function gives back unchanged is a copy: of MedGemma-4B's tower and table, 2 GiB.
        found = {n: value for n, value in merged_policy(model, base, trained).items() if value is not base.get(n)}
        return turned(model, found) if turn else found

    compiled = on_mesh(jax.jit(changed, static_argnames="turn"), mesh)

    def merge(base: Params, trained: Params) -> dict[str, Array]:
        found = compiled(base, trained, turn=is_turned_here(model, {**base, **trained}))
        return {name: value for name, value in base.items() if name in found or name + TURNED not in found} | found

    return merge
