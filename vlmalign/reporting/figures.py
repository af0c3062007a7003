"""The figures that compare: label coverage, scores of the stages on a data set, F1 per label. Lengths in SVG units.

Each takes plain records and returns an `<svg>` element with its own description for a screen reader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from vlmalign.reporting.boards import FEWEST, Board, Line
from vlmalign.reporting.styles import Style, set_styles
from vlmalign.reporting.svg import BAND, BASE, FAINT, FONT, INK, canvas, inline_svg, svg_file
from vlmalign.reporting.words import UNDEFINED, number, shorten

LANE = 10  # between the stages of one label
AIR = 7  # between labels
POOL = "pool"  #: what is drawn from; it is shown as bars
#: the looks of the sets, in the order in which they are listed
_SET_KINDS = ("sft", "grpo", "dpo", "ppo", "adapter", "model")


def coverage_styles(coverage: Mapping[str, Any]) -> dict[str, Style]:
    """Style of every set but the pool."""
    drawn = [name for name in coverage["sets"] if name != POOL]
    return set_styles((name, _SET_KINDS[place % len(_SET_KINDS)]) for place, name in enumerate(drawn))


def coverage_figure(coverage: Mapping[str, Any], name: str) -> Markup:
    """Share of films with each label: the pool as bars, every set drawn from it as a marker, floors and caps as lines."""
    with _coverage(coverage, legend=False) as (figure, alt):
        return inline_svg(figure, name, alt)


def coverage_file(coverage: Mapping[str, Any]) -> str:
    """The same figure as the text of an SVG file, with its legend."""
    with _coverage(coverage, legend=True) as (figure, alt):
        return svg_file(figure, alt)


@contextmanager
def _coverage(coverage: Mapping[str, Any], *, legend: bool) -> Iterator[tuple[Figure, str]]:
    """The figure, and its description for a screen reader. `coverage` has labels, floors, caps and sets."""
    labels, sets, styles = coverage["labels"], coverage["sets"], coverage_styles(coverage)
    shares = {name: [100 * films["counts"][label] / films["films"] for label in labels] for name, films in sets.items()}
    floors = [100 * coverage["floors"].get(label, 0) for label in labels]
    caps = [100 * coverage["caps"].get(label, 1) for label in labels]
    top = 24 + 18 * -(-len(sets) // 3) * legend
    with canvas(430, 26 * len(labels) + 38 + top, left=_margin(labels), right=14, top=top, bottom=38) as canvas_:
        figure, axes, *_ = canvas_
        rows = range(len(labels))
        if POOL in sets:
            axes.barh(rows, shares[POOL], height=0.62, color=BASE, alpha=0.32, linewidth=0, label=POOL)
        for place, (set_name, style) in enumerate(styles.items()):
            # side by side, or sets that were balanced alike would hide one another
            offset = 0.2 * (place - (len(styles) - 1) / 2)
            style.draw(axes, shares[set_name], [row + offset for row in rows], 5, label=set_name)
        highest = max([*floors, *(value for column in shares.values() for value in column)], default=0)
        capped = [row for row in rows if caps[row] < 100]
        _bounds(axes, "floor", [row for row in rows if floors[row]], floors)
        _bounds(axes, "cap", capped, caps)
        _rows(axes, labels)
        axes.set_xlim(0, 1.06 * max([highest, *(caps[row] for row in capped)]) or 1)
        axes.set_xlabel("share of films (%)")
        axes.grid(axis="x")
        if legend:
            box = (14 / canvas_.width, 1 - 4 / canvas_.height)
            figure.legend(
                loc="upper left", bbox_to_anchor=box, ncols=3, frameon=False, fontsize=FONT - 1, borderaxespad=0
            )
        said = " ".join(
            f"{set_name}: lowest {labels[(low := min(rows, key=column.__getitem__))]} {column[low]:.1f} %, highest "
            f"{labels[(high := max(rows, key=column.__getitem__))]} {column[high]:.1f} %."
            for set_name, column in shares.items()
            if labels
        )
        yield figure, f"Share of films with each of {len(labels)} labels. {said}"


def _bounds(axes: Axes, name: str, rows: Sequence[int], shares: Sequence[float]) -> None:
    """One line through all labels where all have the same bound, a short one for each label where they differ."""
    dashes = {"color": INK, "linewidth": 1.1, "linestyle": (0, (4, 2.5) if name == "floor" else (1, 2))}
    if not rows:
        return
    if len(rows) == len(shares) and len(set(shares)) == 1:
        axes.axvline(shares[0], **dashes)
        text, x = f" {name} {shares[0]:g} % ", shares[0]
    else:
        for row in rows:
            axes.vlines(shares[row], row - 0.46, row + 0.46, **dashes)
        text, x = f" {name} ", shares[rows[0]]
    side = "left" if name == "floor" else "right"
    axes.text(x, 1.0, text, transform=axes.get_xaxis_transform(), va="bottom", ha=side, fontsize=FONT - 1)


def scores_figure(board: Board, styles: Mapping[str, Style], name: str) -> Markup:
    """Macro-F1 of every state with its interval, and the best trivial baseline, one band per set of labels."""
    names = [shorten(state, 24) for state in board.results]
    lane, head = 19, 24
    height = sum(head + lane * len(line.blocks) for line in board.lines) + 44
    with canvas(400, height, left=_margin(names), right=14, top=4, bottom=36) as (figure, axes, *_):
        ticks: list[float] = []
        y = 0.0
        for line in board.lines:
            axes.text(0, y + 0.5 * head, _subset(line), va="center", fontsize=FONT - 1, color=INK)
            top = y = y + head
            for state, block in line.blocks.items():
                if len(ticks) % 2 == 0:
                    axes.axhspan(y, y + lane, color=BAND, linewidth=0)
                _interval(axes, block["macro"], y + lane / 2, styles[state])
                ticks.append(y + lane / 2)
                y += lane
            if line.baseline is not None:
                axes.vlines(line.baseline.macro["value"], top, y, color=INK, linewidth=1.6)
        axes.set_yticks(ticks, [shorten(state, 24) for line in board.lines for state in line.blocks])
        axes.set_ylim(y, 0)
        axes.tick_params(axis="y", length=0)
        _f1_axis(axes, "macro-F1")
        alt = f"Macro-F1 on {board.title}, with intervals. " + " ".join(
            f"{_subset(line)}: "
            + ", ".join(f"{state} {number(block['macro']['value'])}" for state, block in line.blocks.items())
            + (f", best trivial baseline {number(line.baseline.macro['value'])}." if line.baseline else ".")
            for line in board.lines
        )
        return inline_svg(figure, name, alt)


def label_figure(board: Board, styles: Mapping[str, Style], name: str) -> Markup:
    """F1 of every label for each state, one lane a state; a tick for the best trivial baseline. Rare labels are grey."""
    line = board.lines[0]
    tables = {state: block["per_label"] for state, block in line.blocks.items()}
    labels = next(iter(tables.values()))
    row = LANE * len(tables) + AIR
    height = row * len(labels) + 56
    left = _margin([label["label"] for label in labels])
    with canvas(380, height, left=left, right=40, top=20, bottom=36) as (figure, axes, *_):
        for place in range(0, len(labels), 2):
            axes.axhspan(place - 0.5, place + 0.5, color=BAND, linewidth=0)
        nowhere = {
            place for place in range(len(labels)) if all(each[place]["f1"]["value"] is None for each in tables.values())
        }
        for place in sorted(nowhere):
            axes.text(0.02, place, UNDEFINED, va="center", fontsize=FONT - 1.5, style="italic")
        rare = {place for place, label in enumerate(labels) if label["support"] < FEWEST}
        for lane, (state, table) in enumerate(tables.items()):
            for place in sorted(set(range(len(labels))) - nowhere):
                y = place + (lane - (len(tables) - 1) / 2) * LANE / row
                style = styles[state]._replace(colour=FAINT) if place in rare else styles[state]
                _interval(axes, table[place]["f1"], y, style, 4.5)
        for place, label in enumerate(line.baseline.block["per_label"] if line.baseline else ()):
            if label["f1"]["value"] is not None:
                axes.vlines(label["f1"]["value"], place - 0.42, place + 0.42, color=INK, linewidth=1.4)
        _rows(axes, [label["label"] for label in labels])
        beside = blended_transform_factory(figure.transFigure, axes.transData)
        axes.text(0.985, -0.6, "cases", transform=beside, ha="right", va="bottom", fontsize=FONT - 1.5)
        for place, label in enumerate(labels):
            colour = FAINT if place in rare else INK
            axes.get_yticklabels()[place].set_color(colour)
            axes.text(
                0.985, place, str(label["support"]), transform=beside, ha="right", va="center", fontsize=FONT - 1,
                color=colour,
            )  # fmt: skip
        _f1_axis(axes, "F1")
        alt = (
            f"F1 per label on {board.title} for {', '.join(tables)}, with intervals, {len(labels)} labels. "
            "The numbers are in the table below."
        )
        return inline_svg(figure, name, alt)


def _subset(line: Line) -> str:
    return f"{line.subset}, {len(line.labels)} labels" if str(len(line.labels)) not in line.subset else line.subset


def _interval(axes: Axes, score: Mapping[str, Any], y: float, style: Style, size: float = 5.5) -> None:
    """A score as a marker on its interval; an undefined score as the word."""
    if score["value"] is None:
        axes.text(0.02, y, UNDEFINED, color=style.colour, va="center", fontsize=FONT - 2.5)
        return
    if score["low"] is not None and score["high"] is not None:
        axes.hlines(y, score["low"], score["high"], color=style.colour, linewidth=2, alpha=0.65)
    style.draw(axes, [score["value"]], [y], size)


def _f1_axis(axes: Axes, name: str) -> None:
    axes.set_xlim(-0.02, 1.02)  # room for half a marker at 0 and at 1
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
    axes.set_xlabel(name)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [shorten(label) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)  # the first label on top
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_color(FAINT)


def _margin(labels: Sequence[str]) -> float:
    """Room for the longest label, at about 0.54 of the font size a character."""
    return 14 + 0.54 * FONT * max((len(shorten(label)) for label in labels), default=0)
