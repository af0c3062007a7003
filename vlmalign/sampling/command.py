"""`vlmalign sample TABLE`: draw balanced sets, write their rows, and show the coverage of labels before and after."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmalign.sampling.tables import Pool

#: a set that is not given a name
SAMPLE = "sample"
#: what the table and the figure call other draws, and themselves
RESERVED = ("pool", "random", "stratified", "coverage")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "table", metavar="TABLE", type=Path,
        help="CSV (plain or .gz), Parquet, JSON Lines; a 0/1 matrix as .npy or CSV; or a study's YAML, with --source",
    )  # fmt: skip
    parser.add_argument(
        "--size", required=True, nargs="+", metavar="N", help="rows of the set; or sets by name: sft=2000 rl=1000"
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="folder to write; new, or empty")
    parser.add_argument(
        "--floor", nargs="+", action="extend", metavar="X",
        help="what every label has at least: a share of the set (0.05, the default) or rows (100); LABEL=X: of one label",
    )  # fmt: skip
    parser.add_argument("--cap", nargs="+", action="extend", metavar="X", help="what every label has at most, likewise")
    parser.add_argument("--seed", type=int, default=0, help="settles ties (0)")
    parser.add_argument("--per-patient", type=int, metavar="N", help="most rows of one patient in a set")
    table = parser.add_argument_group("a table")
    table.add_argument(
        "--labels", metavar="A,B", help="columns that hold 1, 0, -1 or blank; or the one for --separator"
    )
    table.add_argument("--separator", metavar="TEXT", help="--labels is one column of names, joined by this")
    table.add_argument("--patient", metavar="COLUMN", help="no patient is in two sets; without, each row is its own")
    table.add_argument("--view", metavar="COLUMN", help="column of the view")
    table.add_argument("--views", metavar="AP,PA", help="the views that are taken")
    table.add_argument(
        "--uncertain", choices=("positive-only", "u-zeros", "u-ones", "u-ignore"),
        help="-1 is absent (positive-only, the default, and u-zeros), present (u-ones), or its row left out (u-ignore)",
    )  # fmt: skip
    study = parser.add_argument_group("a source of a study")
    study.add_argument("--source", metavar="NAME", help="the source, which says its labels, patients and views itself")


def run(arguments: argparse.Namespace) -> None:
    """Draw and write; ValueError for anything that is not as it should be, and then nothing is written."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vlmalign.data.sampling.bounds import bounds_of
    from vlmalign.data.sampling.sampler import balanced_sample
    from vlmalign.reporting.figures import coverage_file
    from vlmalign.reporting.visible_text import plain
    from vlmalign.sampling.comparison import as_table, coverage, draws

    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ValueError(f"{arguments.out} exists and is not an empty folder; give --out a new one")
    sizes = _sizes(arguments.size)
    floor, floors = _bounds("--floor", arguments.floor)
    cap, caps = _bounds("--cap", arguments.cap)
    bounds = {"floor": 0.05 if floor is None else floor, "floors": floors, "cap": cap, "caps": caps}
    pool = _pool(arguments)
    drawn = balanced_sample(
        pool.labels,
        pool.patients,
        pool.names,
        sizes=sizes,
        seed=arguments.seed,
        films_per_patient=arguments.per_patient,
        **bounds,
    )
    rows = draws(pool, drawn, seed=arguments.seed)
    found = coverage(pool, rows, bounds_of(pool.names, sizes, **bounds), sizes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, each in drawn.sets.items():
        pool.frame.iloc[each.indices].to_csv(arguments.out / f"{name}.csv", index=False)
    as_table(found).to_csv(arguments.out / "coverage.csv", index=False)
    (arguments.out / "coverage.svg").write_text(coverage_file(found), encoding="utf-8")

    shown = Table(title="share of rows with each label", title_justify="left")
    shown.add_column("label")
    for name, part in found["sets"].items():
        shown.add_column(Text(f"{name}\n{part['films']:,} rows"), justify="right")
    for label in found["labels"]:
        shares = [part["counts"][label] / part["films"] for part in found["sets"].values()]
        shown.add_row(Text(plain(label)), *(f"{share:.1%}" for share in shares))
    Console().print(shown)
    if pool.left_out:
        print(f"left out: {pool.left_out:,} rows (uncertain labels, or rows that the source skips)")
    print(
        "random, stratified (iterative stratification): about as many rows as all sets together, drawn to keep the pool's shares"
    )
    if drawn.exact:
        print("the search found no sets; these were found by integer programming")
    print(f"written to {arguments.out}: {', '.join(f'{name}.csv' for name in sizes)}, coverage.csv, coverage.svg")


def _pool(arguments: argparse.Namespace) -> Pool:
    from vlmalign.sampling.tables import Columns, pool_of, read_pool

    given = {
        name: getattr(arguments, name) for name in ("labels", "separator", "patient", "view", "views", "uncertain")
    }
    given = {name: value for name, value in given.items() if value is not None}
    if arguments.table.suffix.lower() in (".yaml", ".yml"):
        from vlmalign.studies.engine.chain import load_study

        if given:
            raise ValueError(f"--{next(iter(given))} is for tables; a source of a study says it itself")
        study = load_study(arguments.table)
        films = [name for name, source in study.sources.items() if source.kind != "rows"]
        if arguments.source not in films:
            raise ValueError(
                f"--source must be one of the sources of films, {', '.join(films) or 'of which there are none'}"
            )
        return pool_of(study.sources[arguments.source].open(study.place))
    if arguments.source is not None:
        raise ValueError("--source is for the YAML file of a study")
    for name in ("labels", "views"):
        if name in given:
            given[name] = [part.strip() for part in given[name].split(",")]
    return read_pool(arguments.table, Columns(**given))


def _sizes(texts: Iterable[str]) -> dict[str, int]:
    """
    >>> _sizes(["200"]), _sizes(["sft=20", "rl=10"])
    ({'sample': 200}, {'sft': 20, 'rl': 10})
    """
    found: dict[str, int] = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        name = name or SAMPLE
        if not number.isdecimal() or name in found or Path(name).name != name or name in RESERVED:
            raise ValueError(
                f"--size {text}: expected a number of rows, or names of sets, each once, as in sft=2000 rl=1000"
            )
        found[name] = int(number)
    return found


def _bounds(option: str, texts: Iterable[str] | None) -> tuple[float | int | None, dict[str, float | int]]:
    """The bound of all labels, if there is one, and of single labels.

    >>> _bounds("--floor", ["0.05", "Fracture=20"])
    (0.05, {'Fracture': 20})
    """
    common, single = None, {}
    for text in texts or ():
        label, _, number = text.rpartition("=")
        try:
            value = int(number) if number.isdecimal() else float(number)
        except ValueError:
            raise ValueError(
                f"{option} {text}: expected a share (0.05), a number of rows (100) or LABEL= and one"
            ) from None
        if label:
            single[label] = value
        else:
            common = value
    return common, single
