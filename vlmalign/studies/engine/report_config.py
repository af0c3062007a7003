"""What a study's report shows beside the study's own numbers. Nothing of it makes an artefact stale: it is about pages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from vlmalign.config import Config
from vlmalign.reporting import published


class Report(Config):
    """The section `report`."""

    beside: Literal["chexreason"] | None = None  #: a paper whose printed tables stand beside ours
    #: table of the paper -> system in it -> the answers of ours beside it, ENTRY/STATE/SET
    rows: dict[str, dict[str, str]] = Field(default_factory=dict)
    readers: str | None = None  #: folder of CheXpert's released test labels, whose human readers are a yardstick


def problems(report: Report, answers: Mapping[str, Any]) -> Iterable[str]:
    """What the section names that the paper, or the study, does not have. `answers` is the study's section of that name."""
    found = [*published.problems(report.beside, report.rows)]
    yield from found
    if not found:
        for table, rows in report.rows.items():
            for system, ref in rows.items():
                entry, state, dataset = ref.split("/")
                known = answers.get(entry)
                if known is None or state not in known.stages or dataset not in known.sets:
                    yield f"report.rows.{table}.{system}: this study has no answers {ref!r}; they are ENTRY/STATE/SET of the section `answers`"
