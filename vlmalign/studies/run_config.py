"""Sections that every study's config has: the devices it runs on, and how it reads films."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from vlmalign.config import Config
from vlmalign.mesh import MeshSettings

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Mesh(Config):
    """Devices along each axis, see `mesh`; one of them may be -1: all that the others leave.

    Rows of micro-batches and rollouts must be multiples of replicas x data x fsdp.
    """

    data: int = -1  #: copies of the parameters; batches are cut by rows
    fsdp: int = 1  #: parameters, gradients and moments are cut, and so are batches
    tensor: int = 1  #: heads, feed-forward and vocabulary are cut
    replicas: int = 1  #: copies of everything, one per node or group of nodes

    @property
    def settings(self) -> MeshSettings:
        return MeshSettings(**self.model_dump())

    @model_validator(mode="after")
    def _in_range(self) -> Mesh:
        MeshSettings(**self.model_dump())
        return self


class Reading(Config):
    """How films are read. None of this changes a pixel."""

    workers: Annotated[int, Field(ge=0)] = 0  #: processes that read ahead; 0: films are read when they are needed
    ahead: Positive = 32  #: films read ahead at most (Gemma 3: 9.6 MB each); no fewer than a batch has
    resize_cache: str | None = None  #: folder of resized films, "{run}" the run's; better a folder that runs share
    resize_cache_gib: Annotated[float, Field(gt=0)] = 64.0  #: its limit: the least recently used go first

    def cache_folder(self, run: Path) -> Path | None:
        """Where resized films are kept by a run in this folder."""
        return None if self.resize_cache is None else Path(self.resize_cache.replace("{run}", str(run)))
