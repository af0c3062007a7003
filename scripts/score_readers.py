"""Scores of human readers on the public CheXpert test labels, beside which a model's can be read.

python scripts/score_readers.py FOLDER               # groundtruth.csv, radiologists/benchmark/*.csv, labeler/*.csv
python scripts/score_readers.py FOLDER --json FILE   # also every label's scores
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vlmalign.evaluation.human_readers import SUBSETS, read_readings, score_readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap by patients (default: 1000)")
    parser.add_argument("--json", type=Path, help="write all scores into this file")
    given = parser.parse_args()
    readings = read_readings(given.folder)
    results = score_readers(readings, draws=given.draws)
    patients = len(set(readings.patients))
    table = Table(title=f"{len(readings.studies)} studies of {patients} patients, 95 % intervals", title_justify="left")
    table.add_column("reader")
    for subset in SUBSETS:
        table.add_column(f"macro-F1, {subset}")
        table.add_column(f"micro-F1, {subset}")
    for name, found in results.items():
        blocks = found["blocks"].values()
        table.add_row(name, *(_interval(block[average]) for block in blocks for average in ("macro", "micro")))
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)  # a file has no width of its own, and 80 columns would fold rows
    console.print(table, highlight=False)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _interval(score: dict) -> str:
    return f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"


if __name__ == "__main__":
    main()
