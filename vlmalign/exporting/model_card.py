"""The model card of an export: that of the stage it comes from, where it comes from a run."""

from __future__ import annotations

from pathlib import Path

from vlmalign.exporting.sources import RECORDS
from vlmalign.reporting.model_card import card
from vlmalign.reporting.run_folder import STUDY, read_run

README = "README.md"


def card_of(adapter: Path, *, merged: bool) -> str | None:
    """The card of a stage's folder, or of the PEFT folder in it; None for an adapter of no finished stage of a run.

    Raises:
        ValueError: for a run folder with a malformed file.
    """
    for stage in (adapter.absolute(), adapter.absolute().parent):
        run = stage.parent.parent
        if stage.parent.name == "stages" and (stage / RECORDS[1]).is_file() and (run / STUDY).is_file():
            found = read_run(run)
            return next((card(found, each, merged=merged) for each in found.stages if each.name == stage.name), None)
    return None
