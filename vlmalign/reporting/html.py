"""`write_report`: a run folder becomes one page, `report.html`, that needs no other file, no script and no network.

The same run folder gives the same page, to the byte: no date, no random identifier. Whatever a model wrote is escaped
like everything else; only our own SVG, CSS and data URIs go in as they are.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmalign.reporting import curves, tables, words
from vlmalign.reporting.completions import StagePages, write_completions
from vlmalign.reporting.examples import PER_KIND, choose_examples
from vlmalign.reporting.figures import coverage_figure, label_figure, overview_figure
from vlmalign.reporting.pages import environment, stylesheet, write_page
from vlmalign.reporting.run_folder import STAGES, RunFolder, read_run
from vlmalign.reporting.svg import BASE, GRPO, OTHER, SFT

#: stage, column -> title, what it means. A column that was not recorded is left out.
CURVES = (
    ("sft", "loss", SFT, "SFT loss", "cross-entropy of the answer, nat per token"),
    ("grpo", "reward", GRPO, "GRPO reward", "mean over the sampled answers of a step"),
    ("grpo", "valid", GRPO, "Valid answers", "share of sampled answers in the required form"),
    ("grpo", "length", GRPO, "Answer length", "mean, tokens"),
    ("grpo", "kl", OTHER, "KL to the reference", "nat per token: how far from the SFT model"),
    ("grpo", "entropy", BASE, "Entropy", "nat per token: how undecided the model is"),
)


def write_report(run: Path) -> Path:
    """Write `report.html` into the run folder `run` and return its path; completions.py says which pages it links to.

    Parts of the run that are not there yet are said to be so. The old report stays until the new one is complete.
    Raises ValueError, naming file and line, if a file of the folder is malformed.
    """
    found = read_run(run)
    path = run / "report.html"
    write_page(path, render(found, write_completions(run)))
    return path


def render(run: RunFolder, completions: Sequence[StagePages] = ()) -> str:
    """The page as text, with links to the pages of `completions`."""
    name = run.path.resolve().name
    return (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            name=name,
            command=f"vlmalign chexreason {shlex.quote(f'{name}/config.yaml')}",
            css=stylesheet("report.css"),
            completions=completions,
            facts=tables.facts(run),
            stage_names=words.STAGE_NAMES,
            headings={stage: name[0].upper() + name[1:] for stage, name in words.STAGE_NAMES.items()},
            set_names=words.SET_NAMES,
            coverage=None if run.coverage is None else coverage_figure(run.coverage),
            training=_training(run),
            skipped_counts=tables.skipped_counts(run.skipped or []),
            shown_skips=tables.SHOWN_SKIPS,
            environment=None if run.environment is None else tables.flatten(run.environment),
            per_kind=PER_KIND,
            difference_verdict=tables.difference_verdict,
            **_evaluation(run),
            examples=_examples(run),
        )
    )


def _training(run: RunFolder) -> dict[str, Any]:
    """The curves as figures, and for each stage the means over the first and last fifth of all that was recorded."""
    rows = {"sft": run.sft, "grpo": run.grpo}
    figures: list[dict[str, Any]] = []
    windows: dict[str, int] = {}
    for stage, column, colour, title, meaning in CURVES:
        line = curves.curve(rows[stage], column) if rows[stage] is not None else None
        if line is not None:
            svg = curves.curve_figure(line, f"{stage}-{column}", title, colour)
            figures.append({"title": title, "meaning": meaning, "svg": svg})
            windows[stage.upper()] = min(len(line.values), curves.rolling_window(len(line.values)))
    recorded = {
        stage: {name: curves.fifths(curves.curve(found, name)) for name in curves.columns(found)}
        for stage, found in rows.items()
        if found is not None
    }
    reward = run.evaluation.reward if run.evaluation is not None else None
    return {
        "figures": figures,
        "windows": windows,
        "recorded": recorded,
        "reward": None if reward is None else tables.reward_sentence(reward),
    }


def _evaluation(run: RunFolder) -> dict[str, Any]:
    """Everything that comes from results.json; None and empty where it is not there yet."""
    lines = tables.headlines(run.evaluation) if run.evaluation is not None else []
    findings = tables.findings(lines)
    return {
        "headlines": lines,
        "findings": findings,
        "shown_stages": [stage for stage in STAGES if any(stage in line.stages for line in lines)],
        "overview": overview_figure(lines) if lines else None,
        "reading": tables.reading(run.evaluation) if run.evaluation is not None else "",
        "label_sets": [_labels(run, place, finding.line) for place, finding in enumerate(findings)],
    }


def _labels(run: RunFolder, place: int, line: tables.Headline) -> dict[str, Any]:
    """F1 per label of one data set, as a figure and as a table."""
    assert run.evaluation is not None
    scores = run.evaluation.scores[line.dataset]
    blocks = {stage: scores[stage]["blocks"][line.subset] for stage in line.stages}
    best = line.baseline
    trivial = run.evaluation.baselines[line.dataset][best.name]["blocks"][line.subset] if best else None
    rows = zip(*(block["per_label"] for block in blocks.values()), strict=True)
    return {
        "line": line,
        "svg": label_figure(f"labels-{place}", line.dataset, blocks, trivial),
        "rows": [
            {
                "label": labels[0]["label"],
                "support": labels[0]["support"],
                "f1": [label["f1"] for label in labels],
            }
            for labels in rows
        ],
    }


def _examples(run: RunFolder) -> dict[str, Any]:
    """Data set -> example films, in the order in which the data sets were first predicted."""
    predictions = run.predictions or []
    names = dict.fromkeys(row["dataset"] for row in predictions)
    return {name: choose_examples(predictions, name, run.path) for name in names}
