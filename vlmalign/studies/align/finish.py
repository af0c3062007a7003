"""What a run ends with, in a form that other tools load: a PEFT folder, or after full fine-tuning a whole checkpoint."""

from __future__ import annotations

from pathlib import Path

from vlmalign.distributed import process_count
from vlmalign.exchange import fetch, from_first
from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.align.system import System, Trained
from vlmalign.weights.export import export_adapter
from vlmalign.weights.whole import export_whole


def finish(config: AlignConfig, system: System, trained: Trained) -> Path:
    """`adapter/` or `model/` in the run folder, written once, read again and compared before it has its name."""
    source, params, base = config.model.path, trained.params, system.frozen
    whole = system.model.lora is None
    folder = config.run / ("model" if whole else "adapter")
    if process_count() > 1:  # one of them writes, from what it holds by itself
        params, base = fetch(params), {} if whole else system.devices.bring(base, system.devices.sampling())

    def write() -> None:
        if folder.exists():
            return
        if whole:
            export_whole(folder, source, system.model, params)
        else:
            export_adapter(folder, system.model, base, params, base_path=str(source))

    from_first(write)
    return folder
