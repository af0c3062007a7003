"""What a run ends with, in a form that other tools load: a PEFT folder, or after full fine-tuning a whole checkpoint."""

from __future__ import annotations

from pathlib import Path

from vlmalign.studies.align.config import AlignConfig
from vlmalign.studies.align.system import System, Trained
from vlmalign.weights.export import export_adapter
from vlmalign.weights.whole import export_whole


def finish(config: AlignConfig, system: System, trained: Trained) -> Path:
    """`adapter/` or `model/` in the run folder, written once, read again and compared before it has its name."""
    source = config.model.path
    if system.model.lora is None:
        folder = config.run / "model"
        if not folder.exists():
            export_whole(folder, source, system.model, trained.params)
        return folder
    folder = config.run / "adapter"
    if not folder.exists():
        export_adapter(folder, system.model, system.frozen, trained.params, base_path=str(source))
    return folder
