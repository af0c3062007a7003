"""The figures that compare: label coverage, macro-F1 at a glance, F1 per label. Lengths in SVG units.

Each takes plain records and returns an `<svg>` element with its own description for a screen reader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.transforms import blended_transform_factory

from vlmalign.reporting.svg import (
    BAND,
    BASE,
    FAINT,
    FONT,
    GRPO,
    INK,
    OTHER,
    SFT,
    STAGE_COLOURS,
    STAGE_MARKERS,
    canvas,
    inline_svg,
)
from vlmalign.reporting.tables import Headline
from vlmalign.reporting.words import STAGE_NAMES, UNDEFINED, number, shorten

LANE = 10  # between the stages of one label
ROW = 33  # between labels: three lanes and some air
_SET_STYLES = {"sft": (SFT, "s"), "rl": (GRPO, "D")}  # as the stages that are trained on them


def coverage_figure(coverage: Mapping[str, Any]) -> Markup:
    """Share of films with each label: the pool as bars, every set drawn from it as a marker, the floor as a line."""
    labels, sets = coverage["labels"], coverage["sets"]
    drawn = [name for name in sets if name != "pool"]
    shares = {
        name: [100 * films["counts"][label] / max(films["films"], 1) for label in labels]
        for name, films in sets.items()
    }
    left = _label_margin(labels)
    with canvas(430, 26 * len(labels) + 62, left=left, right=14, top=24, bottom=38) as (figure, axes, *_):
        rows = range(len(labels))
        if "pool" in sets:
            axes.barh(rows, shares["pool"], height=0.62, color=BASE, alpha=0.32, linewidth=0)
        for place, name in enumerate(drawn):
            colour, marker = _SET_STYLES.get(name, (OTHER, "o"))
            # side by side, or sets that were balanced alike would hide one another
            offset = 0.2 * (place - (len(drawn) - 1) / 2)
            axes.plot(shares[name], [row + offset for row in rows], marker, color=colour, markersize=5, alpha=0.9)
        floor = 100 * coverage["floor"]
        axes.axvline(floor, color=INK, linewidth=1.1, linestyle=(0, (4, 2.5)))
        axes.text(
            floor, 1.0, f" floor {floor:g} %", transform=axes.get_xaxis_transform(), va="bottom", fontsize=FONT - 1
        )
        _label_rows(axes, labels)
        axes.set_xlim(0, 1.06 * max([floor, *(value for column in shares.values() for value in column)]))
        axes.set_xlabel("share of films (%)")
        axes.grid(axis="x")
        alt = f"Share of films with each of {len(labels)} labels, with a floor at {floor:g} %. " + " ".join(
            f"{name}: lowest {labels[(low := min(rows, key=column.__getitem__))]} {column[low]:.1f} %, highest "
            f"{labels[(high := max(rows, key=column.__getitem__))]} {column[high]:.1f} %."
            for name, column in shares.items()
            if labels
        )
        return inline_svg(figure, "coverage", alt)


def overview_figure(rows: Sequence[Headline]) -> Markup:
    """Macro-F1 of every stage with its interval, and the best trivial baseline, per data set and label subset."""
    step, width = 74, 410
    with canvas(width, step * len(rows) + 44, left=12, right=12, top=6, bottom=36) as (figure, axes, *_):
        for place, row in enumerate(rows):
            if place % 2 == 0:
                axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0)
            title = f"{shorten(row.dataset)} · {row.role} · {row.labels} labels · {row.n} films"
            axes.text(0.01, place - 0.3, title, va="center", fontsize=FONT - 0.5)
            for lane, (stage, scores) in enumerate(row.stages.items()):
                _interval(axes, scores.macro, place - 0.06 + 0.2 * lane, stage)
            if row.baseline is not None and row.baseline.macro["value"] is not None:
                axes.vlines(row.baseline.macro["value"], place - 0.16, place + 0.44, color=INK, linewidth=2)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        _f1_axis(axes, "macro-F1")
        alt = "Macro-F1 with intervals. " + " ".join(
            f"{row.dataset}, {row.labels} labels: "
            + ", ".join(f"{STAGE_NAMES[stage]} {number(scores.macro['value'])}" for stage, scores in row.stages.items())
            + (f", best trivial baseline {number(row.baseline.macro['value'])}." if row.baseline else ".")
            for row in rows
        )
        return inline_svg(figure, "overview", alt)


def label_figure(
    name: str,
    dataset: str,
    blocks: Mapping[str, Mapping[str, Any]],
    baseline: Mapping[str, Any] | None,
) -> Markup:
    """F1 of every label for each stage in `blocks` (stage -> Block), one lane a stage; a tick for the baseline."""
    labels = next(iter(blocks.values()))["per_label"]
    height = ROW * len(labels) + 56
    left = _label_margin([label["label"] for label in labels])
    with canvas(380, height, left=left, right=40, top=20, bottom=36) as (figure, axes, *_):
        for place in range(0, len(labels), 2):
            axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0)
        nowhere = [
            place
            for place in range(len(labels))
            if all(block["per_label"][place]["f1"]["value"] is None for block in blocks.values())
        ]
        for place in nowhere:
            axes.text(0.02, place, UNDEFINED, va="center", fontsize=FONT - 1.5, style="italic")
        for lane, (stage, block) in enumerate(blocks.items()):
            for place, label in enumerate(block["per_label"]):
                if place in nowhere:
                    continue
                _interval(axes, label["f1"], place + (lane - (len(blocks) - 1) / 2) * LANE / ROW, stage)
        for place, label in enumerate(baseline["per_label"] if baseline else ()):
            if label["f1"]["value"] is not None:
                axes.vlines(label["f1"]["value"], place - 0.42, place + 0.42, color=INK, linewidth=1.4)
        _label_rows(axes, [label["label"] for label in labels])
        beside = blended_transform_factory(figure.transFigure, axes.transData)
        axes.text(0.985, -0.6, "films", transform=beside, ha="right", va="bottom", fontsize=FONT - 1.5)
        for place, label in enumerate(labels):
            axes.text(0.985, place, str(label["support"]), transform=beside, ha="right", va="center", fontsize=FONT - 1)
        _f1_axis(axes, "F1")
        alt = (
            f"F1 per label on {dataset} for {', '.join(STAGE_NAMES[stage] for stage in blocks)}, "
            f"with intervals, {len(labels)} labels. The numbers are in the table below."
        )
        return inline_svg(figure, name, alt)


def _interval(axes: Axes, score: Mapping[str, Any], y: float, stage: str) -> None:
    """A score as the stage's marker on its interval; an undefined score as the word."""
    colour = STAGE_COLOURS[stage]
    if score["value"] is None:
        axes.text(0.02, y, UNDEFINED, color=colour, va="center", fontsize=FONT - 2.5)
        return
    if score["low"] is not None and score["high"] is not None:
        axes.hlines(y, score["low"], score["high"], color=colour, linewidth=2, alpha=0.65)
    axes.plot(score["value"], y, STAGE_MARKERS[stage], color=colour, markersize=5, clip_on=False)


def _f1_axis(axes: Axes, name: str) -> None:
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    axes.set_xlabel(name)
    axes.grid(axis="x")


def _label_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_color(FAINT)


def _label_margin(labels: Sequence[str]) -> float:
    """Room for the longest label, at about 0.54 of the font size a letter."""
    return 14 + 0.54 * FONT * max((len(shorten(label)) for label in labels), default=0)
