"""What a stage of training ended with: its parameters, read without the model, the optimiser or the devices it ran on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import orbax.checkpoint as ocp
from safetensors import SafetensorError, safe_open

#: a stage's folders of checkpoints while it is under way; where a best state was kept, it is what the stage ends with
BEST, NEWEST = "best", "checkpoints"

#: a finished stage's states, as safetensors
STATES = "states"

#: what a checkpoint holds besides its state
JSON = ("position", "shapes")


class Outcome(NamedTuple):
    """The trained parameters of a stage."""

    params: dict[str, np.ndarray]
    step: int  #: updates done
    folder: Path  #: where they were read from: a folder of checkpoints, or a file


def is_stage(folder: Path) -> bool:
    """True for a folder that a stage of training wrote its checkpoints or its states into."""
    return (folder / NEWEST).is_dir() or (folder / STATES).is_dir()


def read_outcome(stage: Path) -> Outcome:
    """The parameters of the best evaluation where one was kept, else the newest ones.

    Raises:
        ValueError: when nothing has been saved yet.
    """
    for which in ("best", "last"):
        file = stage / STATES / f"{which}.safetensors"
        if file.is_file():
            try:
                with safe_open(file, framework="numpy") as opened:
                    params = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
                    return Outcome(params, int(opened.metadata()["step"]), file)
            except (
                SafetensorError,
                LookupError,
                TypeError,
                ValueError,
            ) as error:  # no metadata, no step, another dtype
                raise ValueError(
                    f"{file} is no state that a stage has written ({type(error).__name__}); restore it"
                ) from error
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
