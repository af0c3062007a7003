"""The config that a run folder holds of an earlier start, and whether a start with this one goes on with that run."""

from __future__ import annotations

import json
from typing import TypeVar

from vlmalign.config import Config, load_config

CONFIG = "config.yaml"

RunConfig = TypeVar("RunConfig", bound=Config)


def earlier_config(config: RunConfig) -> RunConfig | None:
    """What the folder of this run holds, with the folder's present name; None where no run has begun there."""
    path = config.run / CONFIG
    if not path.exists():
        return None
    # JSON quotes the folder's name: `007` is not a number here.
    return load_config(type(config), path, [f"run={json.dumps(str(config.run))}"])


def check_folder(config: RunConfig, before: RunConfig | None = None) -> bool:
    """Whether a run has begun in the folder.

    Raises:
        ValueError: when it is one of another config; `before` is not another.
    """
    earlier = earlier_config(config)
    if earlier is not None and earlier not in (config, before):
        raise ValueError(
            f"{config.run} holds a run of another config (see {config.run / CONFIG}); "
            "choose another run folder, or start again with that config to continue it"
        )
    return earlier is not None
