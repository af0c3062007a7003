"""`write_report`: a run folder becomes one page, `report.html`, that needs no other file, no script and no network.

The same run folder under the same path gives the same page, to the byte: no date, no random identifier. Whatever a
model wrote is escaped like everything else; only our own SVG, CSS and data URIs go in as they are.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlmalign.reporting import boards, figures, score_file, training, words
from vlmalign.reporting.completions import StagePages, write_completions
from vlmalign.reporting.examples import PER_KIND, choose_examples
from vlmalign.reporting.gallery import Gallery, write_galleries
from vlmalign.reporting.model_card import write_cards
from vlmalign.reporting.pages import environment, stylesheet, write_page
from vlmalign.reporting.probes import probe_tables
from vlmalign.reporting.published import beside
from vlmalign.reporting.record import KIND_NAMES, Run, Stage
from vlmalign.reporting.reliability import reliability_figure
from vlmalign.reporting.run_folder import read_run
from vlmalign.reporting.styles import BASELINE, Style, stage_styles
from vlmalign.reporting.tracked import tracked

SEED_NAMES = {"macro": "Macro-F1", "micro": "Micro-F1", "jaccard": "Jaccard"}
SHOWN_LEFT_OUT = 50  # rows of the table of what was left out; the files have them all


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder `run` and return its path; completions.py and gallery.py say which pages it
    links to, model_card.py what is written beside each finished stage.

    Sections that the run does not have, or not yet, are left out. The old report stays until the new one is complete.
    Raises ValueError, naming file and line, if a file of the folder is malformed.
    """
    found = read_run(run)
    path = run / "report.html"
    completions = write_completions(run, [stage.folder for stage in found.stages if stage.folder])
    write_page(path, render(found, completions, write_galleries(found)))
    write_cards(found)
    return path


def render(run: Run, completions: Sequence[StagePages] = (), galleries: Sequence[Gallery] = ()) -> str:
    """The page as text, with links to the pages of `completions` and to `galleries`."""
    styles = stage_styles(run)
    scored = boards.boards(run)
    return (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            name=run.path.resolve().name,
            command=_command(run),
            css=stylesheet("report.css"),
            baseline_mark=BASELINE,
            kinds=KIND_NAMES,
            marks={name: style.mark for name, style in styles.items()},
            facts=_facts(run, scored),
            stages=_stages(run, scored, styles, {pages.folder: pages for pages in completions}),
            scored=_scored(scored, styles),
            roles={board.dataset: board.role for board in scored},
            legend=[state for state in styles if any(board.lines and state in board.results for board in scored)],
            reading=boards.reading(scored),
            verdict=boards.verdict,
            numbers=score_file.numbers,
            seed_names=SEED_NAMES,
            alpha=boards.ALPHA,
            fewest=boards.FEWEST,
            beside=beside(run, boards.FEWEST),
            coverage=_coverage(run),
            examples=_examples(run, styles),
            probes=probe_tables(run.path),
            per_kind=PER_KIND,
            galleries=galleries,
            left_out_counts=Counter(row["where"] for row in run.left_out),
            shown_left_out=SHOWN_LEFT_OUT,
            environment=_flatten(run.environment),
        )
    )


def _command(run: Run) -> str:
    """What repeats the run, by the path that this command was given."""
    config = shlex.quote(str(run.path / run.config_name))
    if run.command:
        return f"{run.command} {config}"
    again = f"{run.path.resolve().name}-again"
    beside = run.path / ".." / again if run.path.name in ("", "..") else run.path.with_name(again)
    return f"vlmalign run {config} --run {shlex.quote(str(beside))}"


def _facts(run: Run, scored: Sequence[boards.Board]) -> dict[str, str]:
    """The run in numbers; only what the folder knows."""
    known = {}
    if trained := [stage for stage in run.stages if stage.metrics]:
        known["Stages trained"] = words.count(len(trained))
        known["Updates"] = words.count(sum(stage.updates for stage in trained))
    if scored:
        sizes = {board.dataset: board.n for board in scored}
        known["Test sets"] = words.count(len(sizes))
        known["Test cases"] = words.count(sum(sizes.values()))
    if run.timing:
        known["Time"] = words.duration(sum(run.timing.values()))
    return known


def _stages(
    run: Run, scored: Sequence[boards.Board], styles: Mapping[str, Style], pages: Mapping[str, StagePages]
) -> list[dict[str, Any]]:
    """Every stage; of those that train: what they did, in sentences, numbers and curves."""
    found = []
    for stage in run.stages:
        trains = stage.kind not in ("model", "adapter")
        log = pages.get(stage.folder)
        seen = tracked(stage, styles[stage.name].css) if trains else None
        found.append(
            {
                "stage": stage,
                "trains": trains,
                "sentences": training.sentences(stage, scored) if trains else [],
                "numbers": training.headline_numbers(stage),
                "tracked": seen,
                "figures": training.figures(
                    stage, styles[stage.name], log.parts if log else (), seen.columns if seen else ()
                ),
                "window": training.window(stage),
                "recorded": training.recorded(stage),
                "seconds": _seconds(run, stage),
                "log": log,
            }
        )
    return found


def _seconds(run: Run, stage: Stage) -> float | None:
    return run.timing.get(stage.folder, run.timing.get(stage.name))


def _scored(found: Sequence[boards.Board], styles: Mapping[str, Style]) -> list[dict[str, Any]]:
    """Every board with its figures."""
    return [
        {
            "board": board,
            "figure": figures.scores_figure(board, styles, f"scores-{place}") if board.lines else None,
            "labels": figures.label_figure(board, styles, f"labels-{place}") if board.lines else None,
            "reliability": reliability_figure(board, styles, f"reliability-{place}") if board.samples else None,
        }
        for place, board in enumerate(found)
    ]


def _coverage(run: Run) -> list[dict[str, Any]]:
    """Every source with the films of its sets."""
    return [
        {
            "name": name,
            **coverage,
            "marks": {part: style.mark for part, style in figures.coverage_styles(coverage).items()},
            "svg": figures.coverage_figure(coverage, f"coverage-{place}"),
        }
        for place, (name, coverage) in enumerate(run.coverage.items())
        if coverage["labels"] and coverage["sets"]
    ]


def _examples(run: Run, styles: Mapping[str, Style]) -> dict[str, Any]:
    """Title of a data set -> example cases."""
    order = sorted(styles, key=run.place)
    return {
        boards.title(run, entry, name): choose_examples(rows, order, run.path)
        for entry in run.entries
        for name in entry.datasets
        # Of several samples of a case the first is shown.
        if (rows := [row for row in entry.predictions if row["dataset"] == name and not row.get("sample")])
    }


def _flatten(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested JSON as one level of names and texts.

    >>> _flatten({"python": "3.12", "packages": {"jax": "0.11"}, "devices": [{"kind": "cpu"}, {"kind": "cpu"}]})
    {'python': '3.12', 'packages: jax': '0.11', 'devices: 1: kind': 'cpu', 'devices: 2: kind': 'cpu'}
    """
    flat: dict[str, str] = {}
    for key, value in record.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, list):
            value = {str(place): item for place, item in enumerate(value, start=1)}
        if isinstance(value, dict):
            flat |= _flatten(value, f"{name}: ")
        else:
            flat[name] = "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return flat
