"""On which devices a study trains, encodes images and samples, from the `mesh` section of its config.

On one device there is no mesh, and nothing here does anything. Training uses all devices of the run. Rollouts use those
of their own process: completions are scored where they were sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlmalign.data.groups import round_up
from vlmalign.exchange import gather_from, local_view
from vlmalign.mesh import TENSOR, MeshSettings, Placement, build_mesh, default_mesh, require_rows, reshard, row_shares
from vlmalign.models.model import Model, Params
from vlmalign.rollout.features import Peers
from vlmalign.rollout.placing import rollout_placement, training_placement
from vlmalign.shapes import Array
from vlmalign.studies.engine.sections import Mesh as Section


@dataclass(frozen=True)
class Devices:
    """Where one model's parameters live."""

    model: Model
    mesh: Mesh | None  #: of training; None: one device
    trains_whole: bool = False  #: some stage trains the whole decoder

    @cached_property
    def training(self) -> Placement | None:
        """Of the base's parameters while training."""
        return self.training_of(self.model)

    def sampling(self, tensor: int = 1) -> Placement | None:
        """Of base parameters in rollouts: whole on each device of this process, or cut over `tensor` of them.

        Raises:
            ValueError: when the devices are no multiple of `tensor`, or the model has nothing that it divides.
        """
        here = build_mesh(MeshSettings(tensor=tensor), jax.local_devices())
        return None if self.mesh is None else rollout_placement(self.model, here)

    def bring(self, params: Params, where: Placement | None) -> dict[str, Array]:
        """Base or merged parameters from where training left them to where rollouts read them."""
        if where is None:
            return dict(params)
        if jax.process_count() == 1:
            return reshard(params, where)
        everywhere = build_mesh(MeshSettings(tensor=where.mesh.shape[TENSOR]))
        return local_view(reshard(params, rollout_placement(self.model, everywhere)), where)

    def training_of(self, model: Model) -> Placement | None:
        """Of this model's parameters, its adapter's too, and their moments while training."""
        return None if self.mesh is None else training_placement(model, self.mesh)

    def place(self, model: Model, params: Mapping[str, Any]) -> dict[str, Array]:
        """Trained parameters of `model`, from wherever they are to where training has them."""
        where = self.training_of(model)
        return {n: jnp.asarray(v) for n, v in params.items()} if where is None else reshard(params, where)

    def encoding(self, base: Mapping[str, Array]) -> tuple[Params, Mesh | None]:
        """What images are encoded with, and on which mesh: each process encodes by itself, what it meets or its part."""
        if self.mesh is None or jax.process_count() == 1:
            return base, self.mesh
        where = self.sampling()
        return self.bring(base, where), where.mesh

    def peers(self) -> Peers:
        """The processes that share out the images of a batch."""
        return Peers(jax.process_index(), jax.process_count(), gather_from)

    def require_rows(self, rows: int, name: str, *, tensor: int | None = None) -> None:
        """Raises ValueError when the setting `name` does not share out over the devices; `tensor`: of a rollout."""
        place = self.training if tensor is None else self.sampling(tensor)
        require_rows(rows, None if place is None else place.mesh, name)


def open_devices(section: Section | None, model: Model, *, whole: bool) -> Devices:
    """All devices of the run on the axes that the config gives, or on the default ones of what is trained.

    `whole`: the decoder, and not only an adapter.

    Raises:
        ValueError: when the axes do not multiply to the devices there are, or one of them divides nothing of the model.
    """
    settings = default_mesh(lora=not whole) if section is None else section.settings
    mesh = build_mesh(settings)
    devices = Devices(model, None if mesh.size == 1 else mesh, whole)
    assert devices.training is None or devices.training.mesh is mesh
    return devices


def full_rows(rows: int, where: Placement | None) -> int:
    """At least so many rows of prompts, in equal parts for the devices that share them out."""
    return round_up(rows, row_shares(None if where is None else where.mesh))
