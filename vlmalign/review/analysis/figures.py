"""The figures of an analysis, as SVG: winning shares of arms, and accuracy against preference. Lengths in SVG units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vlmalign.reporting.styles import Style, set_styles
from vlmalign.reporting.svg import BAND, FAINT, FONT, canvas, inline_svg
from vlmalign.reporting.words import number, shorten

Interval = Mapping[str, Any]
_KINDS = ("sft", "grpo", "dpo", "ppo", "adapter", "model")


def arm_styles(arms: Sequence[str]) -> dict[str, Style]:
    """A colour and a marker for every arm."""
    return set_styles((arm, _KINDS[i % len(_KINDS)]) for i, arm in enumerate(arms))


def shares_figure(shares: Sequence[Mapping[str, Any]], styles: Mapping[str, Style], name: str) -> Markup:
    """Points of every arm against all others, with intervals; .5 is what an arm gets that is neither better nor worse."""
    names = [shorten(row["arm"], 24) for row in shares]
    left = 14 + 0.54 * FONT * max(map(len, names))
    with canvas(420, 22 * len(shares) + 46, left=left, right=14, top=6, bottom=38) as (figure, axes, *_):
        axes.axvline(0.5, color=FAINT, linewidth=1, linestyle=(0, (4, 2.5)))
        for y, row in enumerate(shares):
            if y % 2 == 0:
                axes.axhspan(y - 0.5, y + 0.5, color=BAND, linewidth=0)
            style, points = styles[row["arm"]], row["points"]
            if points["value"] is not None:
                if points["low"] is not None:
                    axes.hlines(y, points["low"], points["high"], color=style.colour, linewidth=2, alpha=0.65)
                style.draw(axes, [points["value"]], [y])
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        _share_axis(axes.set_xlim, axes.set_xticks)
        axes.set_xlabel("share of points against the other arms")
        axes.grid(axis="x")
        said = ", ".join(f"{row['arm']} {number(row['points']['value'])}" for row in shares)
        return inline_svg(figure, name, f"Share of points of each arm against the others, with intervals: {said}.")


def decoupling_figure(
    accuracy: Mapping[str, Interval], score: str, points: Mapping[str, Interval], styles: Mapping[str, Style], name: str
) -> Markup:
    """Each arm at its accuracy and its share of points, with intervals on both axes."""
    arms = [arm for arm in accuracy if points[arm]["value"] is not None]
    with canvas(430, 340, left=52, right=20, top=12, bottom=42) as (figure, axes, *_):
        axes.axhline(0.5, color=FAINT, linewidth=1, linestyle=(0, (4, 2.5)))
        for arm in arms:
            style, across, up = styles[arm], accuracy[arm], points[arm]
            if across["low"] is not None and across["high"] is not None:
                axes.hlines(up["value"], across["low"], across["high"], color=style.colour, linewidth=1.8, alpha=0.6)
            if up["low"] is not None:
                axes.vlines(across["value"], up["low"], up["high"], color=style.colour, linewidth=1.8, alpha=0.6)
            style.draw(axes, [across["value"]], [up["value"]], 6.5)
            axes.annotate(
                shorten(arm, 24), (across["value"], up["value"]), (6, 6), textcoords="offset points", fontsize=FONT - 1
            )
        _share_axis(axes.set_ylim, axes.set_yticks)
        axes.margins(x=0.12)
        axes.set_xlabel(score)
        axes.set_ylabel("share of points")
        axes.grid()
        said = "; ".join(f"{arm} {number(accuracy[arm]['value'])} and {number(points[arm]['value'])}" for arm in arms)
        return inline_svg(
            figure, name, f"{score} and share of points of each arm, with intervals on both axes: {said}."
        )


def _share_axis(set_limits, set_ticks) -> None:
    set_limits(-0.02, 1.02)  # room for half a marker at 0 and at 1
    set_ticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
