"""The tables of shortcut probes, from `probes/NAME/results.json`: plain text, and numbers with their intervals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from vlmalign.reporting.boards import FEWEST
from vlmalign.reporting.json_files import read_object
from vlmalign.reporting.json_shape import NUMBER, Maybe, Values, check_shape
from vlmalign.reporting.score_file import BLOCK, INTERVAL
from vlmalign.reporting.words import bounds, count, number, signed

Row = Mapping[str, Any]

#: of a pair of labels
ODDS = ("answers", "truth", "training", "from_truth", "from_training")
#: pairs of labels shown for each stage and data set
MOST_PAIRS = 10

HEAD = {"kind": str, "draws": int, "rows": list}


class Cell(NamedTuple):
    """What stands in a table: a text, and a small one below it."""

    text: str
    small: str = ""
    number: bool = False


#: where a number would stand
BLANK = Cell("", number=True)


class Table(NamedTuple):
    """One table; `folded`: shown when it is asked for."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    folded: bool = False


def probe_tables(run: Path) -> list[Table]:
    """The tables of all probes of the run folder, by name; ValueError, naming the file, for results that do not fit."""
    found = []
    for path in sorted((run / "probes").glob("*/results.json")):
        results = read_object(path, HEAD)
        if results is not None:
            if results["kind"] not in TABLES:
                raise ValueError(f"{path}: no probe is of kind {results['kind']!r}; known: {', '.join(TABLES)}")
            found += TABLES[results["kind"]](path, results)
    return found


def score(interval: Row, *, sign: bool = False) -> Cell:
    """A number with its interval."""
    return Cell((signed if sign else number)(interval["value"]), bounds(interval, sign=sign), True)


def _altered(path: Path, results: Row) -> Iterator[Table]:
    name, rows = path.parent.name, results["rows"]
    results_shape = {"n": int, "patients": int, "blocks": Values(BLOCK)}
    check_shape(rows, [{"stage": str, "dataset": str, "films": str, "results": results_shape}], f"{path}, rows")
    altered = [row for row in rows if row["films"] != "whole"]
    labels = [{"label": str, "support": int, "f1": INTERVAL}]
    differ = [{"subset": str, "macro": INTERVAL, "micro": INTERVAL}]
    check_shape(altered, [{"same": INTERVAL, "differences": differ}], f"{path}, rows")
    lines = []
    for row in rows:
        (subset, block), *_ = row["results"]["blocks"].items()
        gap = row["differences"][0] if row["films"] != "whole" else None
        lines.append(
            [
                Cell(row["dataset"], f"{count(row['results']['n'])} cases, {subset}"),
                Cell(row["stage"]),
                Cell(row["films"]),
                score(block["macro"]),
                BLANK if gap is None else score(gap["macro"], sign=True),
                BLANK if gap is None else score(gap["micro"], sign=True),
                BLANK if gap is None else score(row["same"]),
            ]
        )
    yield Table(
        f"{name}: altered films",
        "Whole: films as they are. Blank: mean grey. Shuffled: a film of another patient. Border: the outer frame alone. "
        "Same answer: the share of cases with the same labels as for the whole film; 1 says that what was taken plays no "
        "part. The differences are altered minus whole, on the same cases and resamples.",
        ("Data set", "Stage", "Films", "Macro-F1", "Difference", "Of micro-F1", "Same answer"),
        lines,
    )
    for dataset in dict.fromkeys(row["dataset"] for row in altered):
        own = [row for row in altered if row["dataset"] == dataset]
        of_labels = [row["differences"][0].get("labels") for row in own]
        check_shape(of_labels, [labels], f"{path}, rows, labels")
        yield Table(
            f"{name}, by label: {dataset}",
            "Difference of F1, altered minus whole.",
            ("Label", "Cases", *(f"{row['stage']}, {row['films']}" for row in own)),
            [
                [
                    Cell(label["label"]),
                    Cell(count(label["support"]), number=True),
                    *(score(each[place]["f1"], sign=True) for each in of_labels),
                ]
                for place, label in enumerate(of_labels[0])
            ],
            folded=True,
        )


def _pairs(path: Path, results: Row) -> Iterator[Table]:
    name, rows = path.parent.name, results["rows"]
    pair = {"labels": [str], "fewest": int, **dict.fromkeys(ODDS, INTERVAL)}
    check_shape(rows, [{"stage": str, "dataset": str, "training": str, "pairs": [pair]}], f"{path}, rows")
    lines = []
    for row in rows:
        enough = [pair for pair in row["pairs"] if pair["fewest"] >= FEWEST]
        largest = sorted(enough, key=lambda pair: -abs(pair["from_truth"]["value"]))[:MOST_PAIRS]
        where = Cell(row["dataset"], f"{len(enough)} of {len(row['pairs'])} pairs"), Cell(row["stage"])
        if not largest:
            lines.append([*where, Cell("none"), *[BLANK] * len(ODDS)])
        for pair in largest:
            lines.append([*where, Cell(", ".join(pair["labels"])), *(score(pair[each], sign=True) for each in ODDS)])
    yield Table(
        f"{name}: labels named together",
        "Natural logarithms of the odds ratio of naming both labels of a pair, half a film added to each cell. Above 0: more "
        f"often together than if they were named independently. Shown: of pairs of which every table has at least {FEWEST} "
        f"films with either label, the {MOST_PAIRS} whose answers lie farthest from the truth of the same films.",
        ("Data set", "Stage", "Labels", "Answers", "Truth", "Training", "Answers - truth", "Answers - training"),
        lines,
    )


def _institution(path: Path, results: Row) -> Iterator[Table]:
    scored = {"stage": Maybe(str), "features": str, "control": Maybe(str), "majority": NUMBER}
    check_shape(results["rows"], [{**scored, "accuracy": INTERVAL, "auroc": INTERVAL}], f"{path}, rows")
    yield Table(
        f"{path.parent.name}: which data set a film comes from",
        "Logistic regression, out of fold. Tower: the film's soft tokens, which training leaves as they are. Prompt: the "
        "decoder's state from which the answer begins. Controls: labels, the truth in place of features; shuffled, what is "
        "found by chance, mean and spread over shuffles of the sets among patients. Other intervals resample patients "
        "and do not repeat the fits.",
        ("Features", "Stage", "Control", "Films", "AUROC", "Accuracy", "Of the largest set"),
        [
            [
                Cell(row["features"]),
                Cell(row["stage"] or ""),
                Cell(row["control"] or ""),
                Cell(count(row["accuracy"]["n"]), number=True),
                score(row["auroc"]),
                score(row["accuracy"]),
                Cell(number(row["majority"]), number=True),
            ]
            for row in results["rows"]
        ],
    )


def _occlusion(path: Path, results: Row) -> Iterator[Table]:
    name, rows = path.parent.name, results["rows"]
    shape = {
        "dataset": str,
        "system": str,
        "control": bool,
        "label": str,
        "hit": {**INTERVAL, "n": int},
        "iou": INTERVAL,
    }
    check_shape(rows, [shape], f"{path}, rows")

    def line(row: Row) -> list[Cell]:
        gaps = [row.get(each) for each in ("hit_from_centre", "iou_from_centre", "hit_from_before", "iou_from_before")]
        check_shape(gaps, [Maybe(INTERVAL)], f"{path}, rows")
        return [
            Cell(row["dataset"]),
            Cell(row["label"]),
            Cell(f"control: {row['system']}" if row["control"] else row["system"]),
            Cell(count(row["hit"]["n"]), number=True),
            score(row["hit"]),
            score(row["iou"]),
            *(BLANK if gap is None else score(gap, sign=True) for gap in gaps),
        ]

    columns = (
        "Data set", "Label", "Stage", "Boxed findings", "Pointing game", "IoU", "Pointing - centre", "IoU - centre",
        "Pointing - stage before", "IoU - stage before",
    )  # fmt: skip
    note = (
        "Where covering the film makes a finding's name less likely, against boxes. Pointing game: the highest cell lies in a "
        "box. Controls: the centre of the film; random cells, in the mean. Differences are paired."
    )
    yield Table(f"{name}: occlusion", note, columns, [line(row) for row in rows if row["label"] == "all"])
    each = [line(row) for row in rows if row["label"] != "all"]
    yield Table(f"{name}: occlusion, by label", note, columns, each, folded=True)


#: kind of probe -> its tables
TABLES: Mapping[str, Callable[[Path, Row], Iterator[Table]]] = MappingProxyType(
    {"altered": _altered, "pairs": _pairs, "institution": _institution, "occlusion": _occlusion}
)
