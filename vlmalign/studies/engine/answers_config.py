"""The section `answers`: which stages answer which sets, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vlmalign.config import FREE, Config
from vlmalign.evaluation.subgroups import Grouping
from vlmalign.studies.engine.sections import Positive


class Answers(Config):
    """Answers of stages to sets, and their scores."""

    stages: Annotated[tuple[str, ...], Field(min_length=1)]  #: NAME (its best state, where it has one) or NAME@last
    sets: Annotated[tuple[str, ...], Field(min_length=1)]
    task: str | None = None  #: null: the study's only task
    completion: Positive  #: longest answer, tokens
    samples: Positive = 1  #: answers to each case; several are scored where they are label lists
    #: of a label: the share of the samples that name it, or of its first token at <solution> given the reasoning
    probability: Literal["samples", "first-token"] = "samples"
    temperature: Annotated[float, Field(ge=0)] = 0.0  #: 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    draws: Positive = 1000  #: of the bootstrap
    #: column of what is known of the cases -> "values" (scores for each), or the bounds of bands: {age: [40, 60, 80]}
    subgroups: dict[str, Grouping] = Field(default_factory=dict)
    rows: Annotated[Positive, FREE] = 32  #: prompts at once
    prompt_multiple: Annotated[Positive, FREE] = 32
    tensor: Annotated[Positive, FREE] = 1  #: devices that share the weights out among them

    @model_validator(mode="after")
    def _several_differ(self) -> Answers:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples: {self.samples} greedy answers are all the same; set a temperature")
        return self

    @model_validator(mode="after")
    def _bands_ascend(self) -> Answers:
        for column, bounds in self.subgroups.items():
            if bounds != "values" and (not bounds or list(bounds) != sorted(set(bounds))):
                raise ValueError(
                    f"subgroups.{column}: bounds of bands ascend, and there is at least one; found {bounds}"
                )
        return self
