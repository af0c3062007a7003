"""The reliability plot: in each bin of probability, the share of cases that have the label. Lengths in SVG units."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from vlmalign.reporting.boards import Board
from vlmalign.reporting.styles import Style
from vlmalign.reporting.svg import FAINT, canvas, inline_svg
from vlmalign.reporting.words import number

_TICKS = [0, 0.25, 0.5, 0.75, 1]


def reliability_figure(board: Board, styles: Mapping[str, Style], name: str) -> Markup:
    """Share of positives against mean probability of every bin, with intervals, one line a state; all labels together."""
    subset = board.lines[0].subset
    blocks = {state: samples["blocks"][subset] for state, samples in board.samples.items()}
    with canvas(330, 300, left=52, right=14, top=10, bottom=42) as (figure, axes, *_):
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle=(0, (4, 2.5)))
        for state, block in blocks.items():
            style = styles[state]
            means = [each["mean"] for each in block["bins"]]
            shares = [each["share"]["value"] for each in block["bins"]]
            for mean, each in zip(means, block["bins"], strict=True):
                if each["share"]["low"] is not None and each["share"]["high"] is not None:
                    axes.vlines(
                        mean, each["share"]["low"], each["share"]["high"], color=style.colour, linewidth=1.6, alpha=0.55
                    )
            axes.plot(means, shares, color=style.colour, linewidth=1.2)
            style.draw(axes, means, shares, 5)
        for set_limits, set_ticks in ((axes.set_xlim, axes.set_xticks), (axes.set_ylim, axes.set_yticks)):
            set_limits(-0.03, 1.03)
            set_ticks(_TICKS, ["0", ".25", ".5", ".75", "1"])
        axes.set_xlabel("probability")
        axes.set_ylabel("share that have the label")
        axes.grid()
        said = " ".join(
            f"{state}: "
            + ", ".join(f"{number(each['mean'], 2)} {number(each['share']['value'], 2)}" for each in block["bins"])
            + f"; ECE {number(block['ece'])}."
            for state, block in blocks.items()
        )
        return inline_svg(figure, name, f"Reliability on {board.title}, probability and share by bin. {said}")
