"""A paper's printed tables beside the numbers of a run, cell by cell, and what a paper's averages hide.

    report:
      beside: chexreason                                        # one of PAPERS
      rows:                                                     # table -> system of the paper -> answers of the run
        grpo: {"hard reward, best": grpo/grpo-hard/validation}  # ENTRY/STATE/SET

What a run does not have is a reason, never a number. Means over labels count an F1 that is undefined as 0, as the papers'
do; those of printed columns are computed from the printed numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from vlmalign.reporting.json_files import read_yaml
from vlmalign.reporting.json_shape import Values, check_shape
from vlmalign.reporting.record import Row, Run, inner
from vlmalign.reporting.words import listed, number, share, signed

#: the papers whose tables are in FOLDER
PAPERS = ("chexreason",)
FOLDER = Path(__file__).resolve().parent / "papers"

#: score of a table of averages -> how it is written
SCORES = {"micro": "micro-F1", "macro": "macro-F1", "fail": "not valid"}

NOT_MAPPED, NOT_SCORED = "no part of this study", "not scored yet"
NO_LABEL, OTHER_LABELS = "not scored on this label", "not scored on just these labels"
UNDEFINED = "undefined: no case has the label, and no answer names it"


class Cell(NamedTuple):
    """A number of ours, or why there is none."""

    score: Row | None = None  #: value, low, high; low and high are None where there is no interval
    why: str = ""


class Pair(NamedTuple):
    """A printed number, where there is one, and ours beside it."""

    printed: float | None
    ours: Cell


class Line(NamedTuple):
    """One row of a table."""

    name: str
    note: str  #: of ours: how many cases, or which answers
    pairs: list[Pair]
    few: bool = False  #: the label is rare in our set
    mean: bool = False


@dataclass(frozen=True)
class Table:
    """A printed table with ours beside it."""

    title: str
    heads: dict[str, str]  #: column -> below it, the answers of ours
    lines: list[Line]
    sentences: list[str] = field(default_factory=list)  #: what the averages hide, of theirs and of ours

    @property
    def reasons(self) -> dict[str, str]:
        """Why cells of ours are empty -> the letter that stands in them."""
        found = dict.fromkeys(pair.ours.why for line in self.lines for pair in line.pairs if pair.ours.why)
        return {why: chr(ord("a") + place) for place, why in enumerate(found)}


class Beside(NamedTuple):
    """The tables of a paper beside a run."""

    paper: Row
    tables: list[Table]


@cache
def read_paper(name: str) -> Row:
    """A paper's tables as printed (`papers/NAME.yaml`)."""
    return read_yaml(FOLDER / f"{name}.yaml")[1]


def systems(table: Row) -> tuple[str, ...]:
    """The systems of a printed table: its rows, or its columns where the rows are labels."""
    return tuple(table["systems"] if "labels" in table else table["rows"])


def beside(run: Run, fewest: int) -> Beside | None:
    """The tables of the paper that the study names; None where it names none. Labels with fewer than `fewest` positive
    cases are marked.

    Raises:
        ValueError: naming the run's file, where its `report` section does not fit the paper.
    """
    chosen, rows = inner(run.settings, "report", "beside"), inner(run.settings, "report", "rows") or {}
    if chosen not in PAPERS:
        return None
    check_shape(rows, Values(Values(str)), f"{run.path / run.config_name}: report.rows")
    if wrong := [*problems(chosen, rows)]:
        raise ValueError(f"{run.path / run.config_name}: {wrong[0]}; correct the file")
    paper = read_paper(chosen)
    shared = min((tuple(table["labels"]) for table in paper["tables"].values() if "labels" in table), key=len)
    made = []
    for name, table in paper["tables"].items():
        arms = {system: _results(run, (rows.get(name) or {}).get(system)) for system in systems(table)}
        made.append(_by_label(table, arms, shared, fewest) if "labels" in table else _averages(table, arms))
    return Beside(paper, made)


class _Arm(NamedTuple):
    """The answers that stand beside a system."""

    ref: str  #: ENTRY/STATE/SET; empty for none
    results: Row | None
    why: str  #: there are no results

    @property
    def labels(self) -> dict[str, Row]:
        """Label -> its scores."""
        blocks = self.results["blocks"].values() if self.results else ()
        return {each["label"]: each for block in blocks for each in block["per_label"]}

    def mean(self, labels: Sequence[str]) -> Cell:
        """Macro-F1 over just these labels, undefined as 0."""
        if self.results is None:
            return Cell(why=self.why)
        blocks = self.results["blocks"].values()
        found = next((block["macro_all"] for block in blocks if set(block["labels"]) == set(labels)), None)
        return Cell(found) if found else Cell(why=OTHER_LABELS)

    @property
    def size(self) -> str:
        return f"{self.results['n']:,} cases of {self.results['patients']:,} patients" if self.results else ""


def _results(run: Run, ref: str | None) -> _Arm:
    if ref is None:
        return _Arm("", None, NOT_MAPPED)
    entry, state, dataset = ref.split("/")
    scores = next((each.scores for each in run.entries if each.name == entry), None)
    found = None if scores is None else scores.results.get(dataset, {}).get(state)
    return _Arm(ref, found if found and "blocks" in found else None, NOT_SCORED)


def _averages(table: Row, arms: Mapping[str, _Arm]) -> Table:
    """Rows are systems, columns are averages."""
    lines = []
    for system, printed in table["rows"].items():
        arm = arms[system]
        ours = [_average(arm, score) for score in table["scores"]]
        pairs = [Pair(*each) for each in zip(printed, ours, strict=True)]
        lines.append(Line(system, f"{arm.ref}, {arm.size}" if arm.size else arm.ref, pairs))
    heads = {SCORES[score]: "" for score in table["scores"]}
    start = table.get("start")
    return Table(table["title"], heads, lines, [] if start is None else [*_from_start(lines, start)])


def _average(arm: _Arm, score: str) -> Cell:
    if arm.results is None:
        return Cell(why=arm.why)
    if score == "fail":
        return Cell({"value": arm.results["fail_rate"], "low": None, "high": None})
    block = max(arm.results["blocks"].values(), key=lambda block: len(block["labels"]))
    return Cell(block["macro_all" if score == "macro" else score])


def _from_start(lines: Sequence[Line], start: str) -> Iterator[str]:
    """How far each row is from the one that it went on from, printed and ours."""
    first = next(line for line in lines if line.name == start)
    for who, value in (("Printed", lambda pair: pair.printed), ("Ours", lambda pair: _value(pair.ours))):
        told = [
            f"{line.name} micro-F1 {signed(micro)}, macro-F1 {signed(macro)}"
            for line in lines
            if line is not first
            and (micro := _gap(value(line.pairs[0]), value(first.pairs[0]))) is not None
            and (macro := _gap(value(line.pairs[1]), value(first.pairs[1]))) is not None
        ]
        if told:
            yield f"{who}, against {start}: {'; '.join(told)}."


def _value(cell: Cell) -> float | None:
    return None if cell.score is None else cell.score["value"]


def _gap(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _by_label(table: Row, arms: Mapping[str, _Arm], shared: Sequence[str], fewest: int) -> Table:
    """Rows are labels and the means over them, columns are systems."""
    columns = {
        system: {label: row[place] for label, row in table["labels"].items()} for place, system in enumerate(arms)
    }
    lines = []
    for label in table["labels"]:
        support = next((arm.labels[label]["support"] for arm in arms.values() if label in arm.labels), None)
        pairs = [Pair(columns[system][label], _of_label(arm, label)) for system, arm in arms.items()]
        lines.append(Line(label, "" if support is None else str(support), pairs, few=(support or 0) < fewest))
    subsets = {f"mean of {len(table['labels'])}": tuple(table["labels"])}
    if set(shared) < set(table["labels"]):
        subsets[f"mean of the {len(shared)} shared"] = tuple(shared)
    for name, labels in subsets.items():
        pairs = [Pair(_mean(columns[system], labels), arm.mean(labels)) for system, arm in arms.items()]
        lines.append(Line(name, "", pairs, mean=True))
    heads = {system: f"{arm.ref}, {arm.size}" if arm.size else arm.ref for system, arm in arms.items()}
    return Table(table["title"], heads, lines, [*_gains(table, columns, arms, subsets)])


def _of_label(arm: _Arm, label: str) -> Cell:
    if arm.results is None:
        return Cell(why=arm.why)
    if label not in arm.labels:
        return Cell(why=NO_LABEL)
    score = arm.labels[label]["f1"]
    return Cell(score) if score["value"] is not None else Cell(why=UNDEFINED)


def _mean(values: Mapping[str, float], labels: Iterable[str]) -> float:
    chosen = [values[label] for label in labels]
    return sum(chosen) / len(chosen)


def _gains(
    table: Row, columns: Mapping[str, Row], arms: Mapping[str, _Arm], subsets: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    for step in table["gains"]:
        before, after = step["from"], step["to"]
        yield f"Printed: {gain(columns[before], columns[after], subsets, before, after)}"
        if lacking := [name for name in (before, after) if not set(table["labels"]) <= set(arms[name].labels)]:
            why = arms[lacking[0]].why or NO_LABEL
            yield f"Ours: {after} against {before} cannot be told, for want of {listed(lacking)} ({why})."
            continue
        ours = [
            {label: each["f1"]["value"] or 0.0 for label, each in arms[name].labels.items()} for name in (before, after)
        ]
        yield f"Ours: {gain(*ours, subsets, arms[before].ref, arms[after].ref)}"


def gain(
    before: Mapping[str, float],
    after: Mapping[str, float],
    subsets: Mapping[str, Sequence[str]],
    first: str,
    second: str,
) -> str:
    """What the mean F1 gains over each set of labels, and how much of the gain over the first is one label's.

    >>> gain({"a": 0.2, "b": 0.4}, {"a": 0.6, "b": 0.5}, {"mean of 2": ("a", "b"), "mean of 1": ("b",)}, "SFT", "GRPO")
    'GRPO against SFT: mean of 2 0.300 → 0.550, +0.250 (+83 %); mean of 1 0.400 → 0.500, +0.100 (+25 %). a alone is 80 % of the gain over 2 labels.'
    """
    told = []
    for name, labels in subsets.items():
        low, high = _mean(before, labels), _mean(after, labels)
        part = f" ({100 * (high / low - 1):+.0f} %)".replace("-", "\u2212") if low else ""
        told.append(f"{name} {number(low)} → {number(high)}, {signed(high - low)}{part}")
    labels = next(iter(subsets.values()))
    gains = {label: after[label] - before[label] for label in labels}
    most, total = max(gains, key=gains.__getitem__), sum(gains.values())
    # Of a sum that does not grow no label has a share.
    alone = (
        f" {most} alone is {share(gains[most] / total, 0)} of the gain over {len(labels)} labels." if total > 0 else ""
    )
    return f"{second} against {first}: {'; '.join(told)}.{alone}"


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"{name!r}; known: {listed([*known])}"


def problems(paper: str | None, rows: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    """What of a study's `report.rows` names a table or system that the paper has not, or answers in another way than
    ENTRY/STATE/SET."""
    if paper is None:
        if rows:
            yield "report.rows: needs report.beside, the paper whose tables they stand in"
        return
    tables = read_paper(paper)["tables"]
    for name, chosen in rows.items():
        if name not in tables:
            yield f"report.rows: no table {_unknown(name, tables)}"
            continue
        for system, ref in chosen.items():
            if system not in systems(tables[name]):
                yield f"report.rows.{name}: no system {_unknown(system, systems(tables[name]))}"
            if ref.count("/") != 2:
                yield f"report.rows.{name}.{system}: expected ENTRY/STATE/SET, as the folders of answers are called, found {ref!r}"
