"""The curves of training: what each step recorded, thinned to what a page can show, with a rolling mean.

Steps on the horizontal axis are optimiser steps. A value that was not recorded, or was not finite, is null in
`metrics.jsonl` and NaN here: left out of means, a gap in lines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from vlmalign.reporting.svg import FONT, INK, canvas, inline_svg
from vlmalign.reporting.words import number

MOST_POINTS = 400  # of one line: a run of 60,000 steps would make a page of many megabytes


class Curve(NamedTuple):
    """One column of a metrics file, by step."""

    steps: np.ndarray  #: [step] float64
    values: np.ndarray  #: [step] float64, NaN where nothing was recorded


class Fifths(NamedTuple):
    """Means over the first and the last fifth of the steps; None where nothing was recorded."""

    first: float | None
    last: float | None


def curve(rows: Sequence[Mapping[str, Any]], column: str) -> Curve | None:
    """A column of the metrics rows, or None if no row has a number in it."""
    values = [row.get(column) for row in rows]
    numbers = [float(value) if isinstance(value, int | float) else np.nan for value in values]
    if np.isnan(numbers).all():
        return None
    return Curve(np.array([row["step"] for row in rows], float), np.array(numbers))


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names under which rows hold numbers, in the order of first use, without the step."""
    names = (
        name
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    )
    return [name for name in dict.fromkeys(names) if name != "step"]


def fifths(line: Curve) -> Fifths:
    """Means of the first and last 20 % of the recorded steps (at least one step each)."""
    size = max(1, len(line.values) // 5)
    return Fifths(_mean(line.values[:size]), _mean(line.values[-size:]))


def rolling_window(steps: int) -> int:
    """How many steps a rolling mean takes: a tenth of them, at least 5, odd so that it has a middle.

    >>> rolling_window(30), rolling_window(200)
    (5, 21)
    """
    return max(5, steps // 10) | 1


def rolling_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over `window` steps centred on each step (fewer at the ends); NaN where none of them has a value.

    >>> rolling_mean(np.array([0.0, 3.0, np.nan, 5.0]), 3).tolist()
    [1.5, 1.5, 4.0, 5.0]
    """
    known = ~np.isnan(values)
    sums = _windowed(np.where(known, values, 0.0), window)
    counts = _windowed(known.astype(float), window)
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def thin(line: Curve, most: int = MOST_POINTS) -> Curve:
    """Means over runs of consecutive steps, so that at most `most` points are left; as it is if it has no more."""
    size = -(-len(line.values) // most)
    if size == 1:
        return line
    starts = np.arange(0, len(line.values), size)
    known = ~np.isnan(line.values)
    sums = np.add.reduceat(np.where(known, line.values, 0.0), starts)
    counts = np.add.reduceat(known.astype(float), starts)
    return Curve(line.steps[starts], np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0))


def curve_figure(line: Curve, name: str, title: str, colour: str) -> Markup:
    """One column against the step: what was recorded, faint, and its rolling mean. `name` is unique on the page."""
    smooth = Curve(line.steps, rolling_mean(line.values, rolling_window(len(line.values))))
    with canvas(380, 206, left=50, right=12, top=10, bottom=38) as (figure, axes, *_):
        raw, mean = thin(line), thin(smooth)
        single = len(raw.values) == 1
        axes.plot(*raw, "o" if single else "-", color=colour, alpha=1.0 if single else 0.35, linewidth=1)
        axes.plot(*mean, color=colour, linewidth=2.2)
        axes.set_xlabel("step")
        axes.locator_params(nbins=5)
        axes.ticklabel_format(useOffset=False)
        axes.tick_params(labelsize=FONT - 0.5)
        axes.grid(axis="y")
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=INK, linewidth=0.8)
        ends = fifths(line)
        alt = (
            f"{title} over {len(line.values)} steps: mean {number(ends.first)} in the first fifth, "
            f"{number(ends.last)} in the last."
        )
        return inline_svg(figure, name, alt)


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None


def _windowed(values: np.ndarray, window: int) -> np.ndarray:
    """Sums over `window` entries centred on each entry, as far as there are any."""
    half = window // 2
    total = np.concatenate([[0.0], values.cumsum()])
    places = np.arange(len(values))
    return total[np.minimum(places + half + 1, len(values))] - total[np.maximum(places - half, 0)]
