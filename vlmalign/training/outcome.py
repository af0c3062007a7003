"""What a stage of training ended with: its parameters, read without the model, the optimiser or the devices it ran on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp

#: a stage's folders of checkpoints; where a best state was kept, it is what the stage ended with
BEST, NEWEST = "best", "checkpoints"

#: what a checkpoint holds besides its state
JSON = ("position", "shapes")


class Outcome(NamedTuple):
    """The trained parameters of a stage."""

    params: dict[str, np.ndarray]
    step: int  #: updates done
    folder: Path  #: of the checkpoints they were read from


def is_stage(folder: Path) -> bool:
    """True for a folder that a stage of training wrote its checkpoints into."""
    return (folder / NEWEST).is_dir()


def read_outcome(stage: Path) -> Outcome:
    """The parameters of the best evaluation where one was kept, else the newest ones.

    Raises:
        ValueError: when nothing has been saved yet.
    """
    for folder in (stage / BEST, stage / NEWEST):
        if folder.is_dir():
            options = ocp.CheckpointManagerOptions(create=False)
            handlers = {"state": ocp.PyTreeCheckpointHandler(), **{name: ocp.JsonCheckpointHandler() for name in JSON}}
            with ocp.CheckpointManager(folder.resolve(), options=options, item_handlers=handlers) as manager:
                step = manager.latest_step()
                if step is not None:
                    shapes = manager.item_metadata(step)["state"].tree["params"]
                    like = {"params": {name: np.zeros((0,), found.dtype) for name, found in shapes.items()}}
                    wanted = {"params": {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in shapes}}
                    args = ocp.args.PyTreeRestore(item=like, restore_args=wanted, partial_restore=True)
                    found = manager.restore(step, args=ocp.args.Composite(state=args))["state"]["params"]
                    return Outcome(dict(found), step, folder)
    raise ValueError(f"{stage} holds no checkpoint yet; let the stage run until it has saved one")
