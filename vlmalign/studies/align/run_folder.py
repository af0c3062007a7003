"""The run folder: whose it is, and files in it that are there whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlmalign.config import dump_config
from vlmalign.machine import environment_record, matmul_rate
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.earlier import CONFIG


def begin(config: AlignConfig) -> None:
    """Write the resolved config and the machine's record, unless an earlier start of the run has."""
    path = config.run / CONFIG
    if path.exists():
        return
    config.run.mkdir(parents=True, exist_ok=True)
    record = {**environment_record(), "matmul_gflops": matmul_rate()}
    # The config last: its presence says that the run has begun.
    write_whole(config.run / "environment.json", json.dumps(record, indent=1) + "\n")
    write_whole(path, dump_config(config))


def write_whole(path: Path, text: str) -> None:
    """A file that is there whole or not at all, whatever happens meanwhile."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
