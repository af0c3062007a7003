"""What a run folder holds, as one record whatever its layout: stages in graph order, sets, answers, scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

#: kind of a stage -> how it is written
KIND_NAMES = {"model": "model", "adapter": "adapter", "sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "ppo": "PPO"}

Row = Mapping[str, Any]


def inner(value: Any, *names: str) -> Any:
    """What stands in nested sections under these names; None where there is no such thing.

    >>> inner({"sets": {"test": {"from": "films"}}}, "sets", "test", "from"), inner({"sets": []}, "sets", "test")
    ('films', None)
    """
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class Stage:
    """A model, an adapter, or a stage of training."""

    name: str
    kind: str  #: of KIND_NAMES
    parent: str | None  #: the stage it goes on from
    folder: str  #: relative to the run folder
    metrics: list[Row] = field(default_factory=list)  #: one row an update, or less
    done: bool = True  #: False: begun, and not at its end

    @property
    def updates(self) -> int:
        return self.metrics[-1]["step"] if self.metrics else 0


@dataclass(frozen=True)
class Scores:
    """`results.json` of an answers entry; results are as evaluation writes them."""

    datasets: list[Row]
    results: dict[str, dict[str, Row]]  #: data set -> stage -> results, stages in order
    baselines: dict[str, dict[str, Row]]  #: data set -> name -> results
    differences: list[Row]
    tests: Row  #: how their p-values were adjusted; empty in older files
    subgroups: list[Row]  #: scores of the cases of a group: "stage", "dataset", "column", "group", "results"
    seeds: dict[str, list[Row]]  #: of siblings that differ by their seeds: "results" and "differences" over them


@dataclass(frozen=True)
class Entry:
    """Answers of stages to sets, and their scores where they have been scored."""

    name: str
    predictions: list[Row]
    scores: Scores | None

    @cached_property
    def datasets(self) -> list[str]:
        """In the order in which they were scored, then answered."""
        scored = [] if self.scores is None else [dataset["name"] for dataset in self.scores.datasets]
        return list(dict.fromkeys([*scored, *(row["dataset"] for row in self.predictions)]))


@dataclass(frozen=True)
class Run:
    """A run folder. What a run does not have, or not yet, is empty."""

    path: Path
    command: str | None  #: of version 0.1 that wrote the folder, such as "vlmalign align"; None: of this version
    config_name: str
    config: str  #: as written
    settings: Mapping[str, Any]  #: what it says
    stages: list[Stage]  #: in graph order
    coverage: dict[str, Row]  #: source -> labels, their floors and caps as shares, and the films of each set drawn
    left_out: list[Row]  #: films and rows that could not be used: "where", "id", "reason"
    entries: list[Entry]
    peeked: list[str]  #: test sets that were used to choose or to watch
    environment: Row
    readers: Row | None  #: human readers of the CheXpert test studies: "studies", and "readers": name -> results
    timing: dict[str, float]  #: artefact -> seconds, resumed parts added up

    def source_of(self, ref: str) -> Row:
        """The section of the source that a set (`test`, `train.rl`) is drawn from, and whether it is "invented"; of version
        0.1 that alone."""
        sources = inner(self.settings, "sources")
        names = sources if isinstance(sources, Mapping) else {}
        found = inner(sources, str(inner(self.settings, "sets", ref.partition(".")[0], "from")))
        found = found if isinstance(found, Mapping) else {}
        # A source can read another split of what is invented for one.
        roots = [inner(sources, name, "root") for name in names if inner(sources, name, "phantom")]
        return {**found, "invented": found.get("root") is not None and found["root"] in roots}

    def place(self, state: str) -> int:
        """Where a state (`sft`, `sft@last`) stands in graph order."""
        names = [stage.name for stage in self.stages]
        name = state.partition("@")[0]
        return names.index(name) if name in names else len(names)
