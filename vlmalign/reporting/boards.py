"""What was scored on each data set, in the shape of tables: a board per answers entry and data set.

Averages over different label sets cannot be compared, so a board of labels has one line per set of labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vlmalign.reporting.record import Entry, Row, Run, Scores
from vlmalign.reporting.score_file import numbers
from vlmalign.reporting.words import listed, p_value

Interval = Mapping[str, Any]

ALPHA = 0.05  #: of a family of tests: the chance of any false "higher" or "lower" in it
FEWEST = 10  #: positive cases below which a label is grey


class Trivial(NamedTuple):
    """A trivial baseline on one set of labels."""

    name: str
    block: Row

    @property
    def macro(self) -> Interval:
        return self.block["macro"]


@dataclass(frozen=True)
class Line:
    """One set of labels: the block of every state, and the trivial baselines."""

    subset: str
    labels: list[str]
    supported: int  #: of them, those that some case has: what macro-F1 is taken over
    blocks: dict[str, Row]  #: state -> block
    baselines: list[Trivial]

    @property
    def baseline(self) -> Trivial | None:
        """The baseline with the highest macro-F1; of equal ones the first."""
        defined = [each for each in self.baselines if each.macro["value"] is not None]
        return max(defined, key=lambda each: each.macro["value"], default=None)

    def gain(self, state: str) -> float | None:
        """Macro-F1 of a state above that of the best trivial baseline."""
        value = self.blocks[state]["macro"]["value"]
        return None if value is None or self.baseline is None else value - self.baseline.macro["value"]


class Group(NamedTuple):
    """The cases that one value, or band, of a column has; each state's results on them."""

    column: str
    name: str
    results: dict[str, Row]  #: state -> results


@dataclass(frozen=True)
class Board:
    """One data set as one answers entry scored it."""

    title: str  #: the data set, and the entry where a run has several
    entry: str
    first: bool  #: of the data sets of its entry
    dataset: str
    role: str | None
    n: int
    patients: int | None
    unmapped: dict[str, int]  #: labels of the data set without a counterpart -> cases
    only_unmapped: int  #: cases that have such labels alone
    results: dict[str, Row]  #: state -> results
    lines: list[Line]  #: of label lists, most labels first; of other kinds empty
    numbers: dict[str, dict[str, Interval]]  #: of other kinds: state -> name -> score
    differences: list[Row]
    tests: Row  #: how the p-values of the differences were adjusted; empty where they have none
    groups: list[Group]
    seeds: list[Row]  #: of siblings: their numbers over seeds
    seed_differences: list[Row]  #: likewise, between two families, seed by seed
    readers: dict[str, dict[str, Row]]  #: of the CheXpert test films: human reader -> subset of a line -> block

    @property
    def names(self) -> list[str]:
        """Of `numbers`, in the order of the task."""
        return list(dict.fromkeys(name for found in self.numbers.values() for name in found))

    @property
    def samples(self) -> dict[str, Row]:
        """State -> what several samples of each case tell; empty where there is one."""
        return {state: found["samples"] for state, found in self.results.items() if found.get("samples")}

    @property
    def by_label(self) -> list[Row]:
        """The differences that have their labels."""
        return [row for row in self.differences if row.get("labels")]

    @property
    def out_of_reach(self) -> str:
        """Why no average can be told apart, however large its difference; empty where it can."""
        tests = self.tests["families"]["averages"] if self.tests else 0
        least = self.tests["smallest_p"] * tests if tests else 0.0
        if least <= ALPHA:
            return ""
        return f"{tests} tests of p >= {p_value(self.tests['smallest_p'])} are {p_value(least)} at best; raise draws"


def boards(run: Run) -> list[Board]:
    """Every data set on which some state has been scored."""
    return [
        _board(
            title(run, entry, dataset["name"]),
            entry.name,
            place == 0,
            entry.scores,
            dataset,
            results,
            readers_of(run, dataset),
        )
        for entry in run.entries
        if entry.scores is not None
        for place, dataset in enumerate(entry.scores.datasets)
        if (results := entry.scores.results[dataset["name"]])
    ]


def title(run: Run, entry: Entry, dataset: str) -> str:
    """A data set's name, and the entry's where several entries answer it."""
    answered = [each.name for each in run.entries if dataset in each.datasets]
    return f"{dataset}, {entry.name}" if len(answered) > 1 else dataset


def readers_of(run: Run, dataset: Row) -> Mapping[str, Row]:
    """Human readers who have read the studies of a data set: those of the CheXpert test set, as it was released."""
    source = run.source_of(dataset["name"])
    read = source.get("kind") == "chexpert" and source.get("split") == "test" and not source["invented"]
    return run.readers["readers"] if run.readers and read else {}


def _board(
    title: str,
    entry: str,
    first: bool,
    scores: Scores,
    dataset: Row,
    results: dict[str, Row],
    readers: Mapping[str, Row],
) -> Board:
    name = dataset["name"]
    blocks = {state: each["blocks"] for state, each in results.items() if "blocks" in each}
    trivial = {name: each["blocks"] for name, each in scores.baselines[name].items() if "blocks" in each}
    lines = [
        _line(subset, blocks, trivial) for subset in dict.fromkeys(name for each in blocks.values() for name in each)
    ]
    return Board(
        title=title,
        entry=entry,
        first=first,
        dataset=name,
        role=dataset["role"],
        n=dataset["n"],
        patients=dataset.get("patients"),
        unmapped=dataset.get("unmapped") or {},
        only_unmapped=dataset.get("only_unmapped") or 0,
        results=results,
        lines=sorted(lines, key=lambda line: -len(line.labels)),
        numbers={state: found for state, each in results.items() if (found := numbers(each))},
        differences=[row for row in scores.differences if row["dataset"] == name],
        tests=scores.tests,
        groups=_groups([row for row in scores.subgroups if row["dataset"] == name]),
        seeds=[row for row in scores.seeds["results"] if row["dataset"] == name],
        seed_differences=[row for row in scores.seeds["differences"] if row["dataset"] == name],
        readers={reader: _lines_of(each["blocks"], lines) for reader, each in readers.items()},
    )


def _line(subset: str, blocks: Mapping[str, Mapping[str, Row]], trivial: Mapping[str, Mapping[str, Row]]) -> Line:
    own = {state: each[subset] for state, each in blocks.items() if subset in each}
    first = next(iter(own.values()))
    baselines = [Trivial(name, each[subset]) for name, each in trivial.items() if subset in each]
    return Line(subset, first["labels"], first["macro_labels"], own, baselines)


def _lines_of(blocks: Mapping[str, Row], lines: Sequence[Line]) -> dict[str, Row]:
    """Subset of a line -> the block of just its labels."""
    return {
        line.subset: block for line in lines for block in blocks.values() if set(block["labels"]) == set(line.labels)
    }


def _groups(rows: list[Row]) -> list[Group]:
    """In the order of the file."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["column"], row["group"]), {})[row["stage"]] = row["results"]
    return [Group(column, name, results) for (column, name), results in found.items()]


def verdict(interval: Interval) -> str:
    """What a paired difference shows: "higher", "lower", or that it shows neither.

    By its adjusted p-value where it has one; files of before p-values have the interval alone.
    """
    if interval["low"] is None or interval["high"] is None:
        return "not determined"
    if interval.get("p_holm") is not None:
        told = interval["p_holm"] <= ALPHA and interval["value"] != 0
        return ("higher" if interval["value"] > 0 else "lower") if told else "no difference shown"
    return "higher" if interval["low"] > 0 else "lower" if interval["high"] < 0 else "no difference shown"


def reading(found: list[Board]) -> str:
    """How the intervals were made, from what the results say of themselves."""
    results = [each for board in found for each in board.results.values() if "draws" in each]
    made = sorted({(each["level"], each["draws"]) for each in results})
    return listed([f"{100 * level:g} % intervals from {draws:,} draws" for level, draws in made]) if made else ""
