"""Where a model's parameters live on a mesh: cut for training, whole or cut over `tensor` for rollouts."""

from __future__ import annotations

from collections.abc import Sequence

from jax.sharding import AbstractMesh, Mesh

from vlmalign.mesh import FSDP, TENSOR, Placement, placement
from vlmalign.models.model import Model


def training_placement(model: Model, mesh: Mesh | AbstractMesh) -> Placement:
    """Parameters, adapter and moments cut over `fsdp` and `tensor`; ValueError when an axis cuts nothing."""
    return _place(model, mesh, (FSDP, TENSOR))


def rollout_placement(model: Model, mesh: Mesh | AbstractMesh) -> Placement:
    """Base parameters for sampling: whole on every device, or cut over `tensor`, so that no step gathers them.

    `fsdp` cuts none of them: its shares would have to be gathered for every token.
    """
    return _place(model.without_lora(), mesh, (TENSOR,))


def _place(model: Model, mesh: Mesh | AbstractMesh, over: Sequence[str]) -> Placement:
    decoder = model.config.decoder
    # Heads are cut between and never across, where each device attends with its own.
    pieces = {"heads": decoder.heads, "kv_heads": decoder.kv_heads}
    return placement(mesh, model.shapes, model.dims, over=over, pieces=pieces)
