"""The kinds of probe: what is asked of finished states beside answers, to find out what their answers rest on
(docs/probes.md).

What a model must be run for is measured for each state and set, an artefact each; a probe's results follow from these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vlmalign.config import FREE, Config
from vlmalign.studies.engine.sections import Positive

#: the file of a measurement
ROWS = "rows.jsonl"

Films = Literal["blank", "shuffled", "border"]


class Probe(Config):
    """What all kinds have in common."""

    draws: Positive = 1000  #: of the bootstrap

    def variants(self) -> Sequence[str | None]:
        """How films are altered, a measurement each; None: as they are. Empty: nothing is measured."""
        return ()

    def measured_with(self, variant: str | None) -> dict[str, Any]:
        """The settings of its own that a measurement follows from."""
        del variant
        return {}


class OfAnswers(Probe):
    """A probe that goes on from the answers of an entry: its stages, sets, task and decoding are the entry's."""

    answers: str  #: the entry; of label lists


class AlteredProbe(OfAnswers):
    """The answers of an entry once more, to films from which something was taken."""

    kind: Literal["altered"] = "altered"
    #: blank: the film's mean grey; shuffled: a film of another patient; border: the outer frame alone
    films: Annotated[tuple[Films, ...], Field(min_length=1)] = ("blank", "shuffled", "border")
    border: Annotated[float, Field(gt=0, lt=0.5)] = 0.1  #: width of that frame, a share of the film's shorter side

    def variants(self) -> Sequence[str | None]:
        return self.films

    def measured_with(self, variant: str | None) -> dict[str, Any]:
        return {"films": variant} | ({"border": self.border} if variant == "border" else {})


class PairsProbe(OfAnswers):
    """Which labels the answers of an entry name together, beside a training table."""

    kind: Literal["pairs"] = "pairs"
    training: str  #: the set whose labels were learnt from


class OfStates(Probe):
    """A probe that asks the states themselves."""

    stages: Annotated[tuple[str, ...], Field(min_length=1)]  #: NAME (its best state, where it has one) or NAME@last
    sets: Annotated[tuple[str, ...], Field(min_length=1)]  #: of films
    task: str | None = None  #: null: the study's only task
    tokens: Annotated[Positive, FREE] = 8192  #: of prompts that are computed at once

    def variants(self) -> Sequence[str | None]:
        return (None,)


class InstitutionProbe(OfStates):
    """Whether a linear function of what the model makes of a film tells which of the sets it comes from."""

    kind: Literal["institution"] = "institution"
    sets: Annotated[tuple[str, ...], Field(min_length=2)]
    folds: Annotated[int, Field(ge=2)] = 5
    shuffles: Positive = 20  #: of the sets among patients, for what is found by chance


class OcclusionProbe(OfStates):
    """Where covering a film makes a finding's name less likely, against boxes drawn by readers."""

    kind: Literal["occlusion"] = "occlusion"
    boxes: Annotated[Path, FREE]  #: NIH's BBox_List_2017.csv, plain or .gz
    cells: Annotated[int, Field(ge=2)] = 8  #: per side of the map
    patch: Positive = 2  #: cells per side that are covered at a time; it moves by one cell
    top: Annotated[float, Field(gt=0, lt=1)] = 0.1  #: share of the cells, the highest, that the IoU is taken of

    def measured_with(self, variant: str | None) -> dict[str, Any]:
        del variant
        return {"cells": self.cells, "patch": self.patch}

    @model_validator(mode="after")
    def _patch_moves(self) -> OcclusionProbe:
        if self.patch >= self.cells:
            raise ValueError(
                f"patch must be smaller than cells ({self.cells}), or it has one place; found {self.patch}"
            )
        return self


AnyProbe = Annotated[AlteredProbe | PairsProbe | InstitutionProbe | OcclusionProbe, Field(discriminator="kind")]


def folder_of(stage: str, set: str, variant: str | None = None) -> str:
    """Where the answers, or a measurement, of a state on a set lie below their entry or probe.

    >>> folder_of("sft", "near", "blank"), folder_of("sft@last", "train.rl")
    ('sft/near@blank', 'sft@last/train.rl')
    """
    return f"{stage}/{set}" + ("" if variant is None else f"@{variant}")
