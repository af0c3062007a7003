"""The curves of training: what each step recorded, thinned to what a page can show, with a rolling mean.

Steps on the horizontal axis are optimiser steps. A value that was not recorded, or was not finite, is null in
`metrics.jsonl` and NaN here: left out of means, a gap in lines. What is measured now and then (validation) is dots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from vlmalign.reporting.words import measured

MOST_POINTS = 400  # of one line: a run of 60,000 steps would make a page of many megabytes
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 380, 206, 50, 12, 10, 38  # of a figure and its margins, SVG units
_FEW = 10  # fewer values than this are dots: their rolling mean would be a flat line
_GRID = ' stroke="var(--faint)" stroke-opacity=".35" stroke-width=".5"'


class Curve(NamedTuple):
    """One column of a metrics file, by step."""

    steps: np.ndarray  #: [step] float64
    values: np.ndarray  #: [step] float64, NaN where nothing was recorded


class Drawn(NamedTuple):
    """A curve as a figure draws it."""

    line: Curve
    colour: str  #: of CSS
    dash: str = ""  #: of SVG; empty: unbroken


class Fifths(NamedTuple):
    """Means over the first and the last fifth of what was recorded."""

    first: float
    last: float


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
    """Means of the first and last 20 % of the recorded values (at least one each)."""
    known = line.values[~np.isnan(line.values)]
    size = max(1, len(known) // 5)
    return Fifths(float(known[:size].mean()), float(known[-size:].mean()))


def gain_in_errors(line: Curve) -> float | None:
    """Last fifth minus first, in standard errors: sqrt(s1^2 / n1 + s2^2 / n2), s the deviation of the values of each.

    Values are taken as independent draws. None below ten values, and where neither fifth varies.
    """
    known = line.values[~np.isnan(line.values)]
    size = len(known) // 5
    if size < 2:
        return None
    first, last = known[:size], known[-size:]
    error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / size)
    return float((last.mean() - first.mean()) / error) if error > 0 else None


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


def curve_figure(line: Curve, title: str, colour: str) -> Markup:
    """One column against the step as an `<svg>`: what was recorded, faint, and its rolling mean, or dots.

    `colour` is a CSS colour. Written out here and not by matplotlib, which takes 70 ms for a figure: a study of a few
    stages has fifty of these.
    """
    ends = fifths(line)
    alt = (
        f"{title} over {line.steps[-1]:.0f} steps: mean {measured(ends.first)} in the first fifth, "
        f"{measured(ends.last)} in the last."
    )
    return lines_figure([Drawn(line, colour)], alt, first=line.steps[0], last=line.steps[-1])


def lines_figure(drawn: Sequence[Drawn], alt: str, *, first: float, last: float) -> Markup:
    """Curves that are measured alike in one `<svg>`, over the steps `first` to `last`."""
    across = _Axis(first, last, _LEFT, _WIDTH - _RIGHT, integer=True)
    low, high = (end([end(each.line.values[~np.isnan(each.line.values)]) for each in drawn]) for end in (min, max))
    up = _Axis(low, high, _HEIGHT - _BOTTOM, _TOP)
    right, floor = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    marks = []
    for value in up.ticks:
        y = up.place(value)
        strong = ' stroke="var(--ink)" stroke-width=".8"' if value == 0 else _GRID
        marks.append(f'<path d="M{_LEFT} {y:.1f}H{right}"{strong}/>')
        marks.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{measured(value)}</text>')
    for value in across.ticks:
        marks.append(f'<text x="{across.place(value):.1f}" y="{floor + 16}" text-anchor="middle">{value:.0f}</text>')
    marks.append(f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 4}" text-anchor="middle">step</text>')
    marks.append(f'<path d="M{_LEFT} {_TOP}V{floor}H{right}" fill="none" stroke="var(--faint)" stroke-width=".8"/>')
    for each in drawn:
        marks += _strokes(each, across, up)
    head = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(alt)}" font-size="11" fill="var(--ink)">'
    )
    return Markup(head + "".join(marks) + "</svg>")


def _strokes(drawn: Drawn, across: _Axis, up: _Axis) -> list[str]:
    """A curve: dots that are joined, or its values, faint, and their rolling mean."""
    line, known = drawn.line, ~np.isnan(drawn.line.values)
    pen = f'fill="none" stroke="{drawn.colour}" stroke-linejoin="round"'
    pen += f' stroke-dasharray="{drawn.dash}"' if drawn.dash else ""
    if known.sum() < _FEW or known.mean() <= 0.5:
        dots = thin(Curve(line.steps[known], line.values[known]))
        spots = ((across.place(x), up.place(y)) for x, y in zip(*dots, strict=True))
        return [
            f'<path d="{_path(dots, across, up)}" {pen} stroke-width="1.4"/>',
            *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{drawn.colour}"/>' for x, y in spots),
        ]
    smooth = Curve(line.steps, rolling_mean(line.values, rolling_window(len(line.values))))
    return [
        f'<path d="{_path(thin(line), across, up)}" {pen} stroke-opacity=".35"/>',
        f'<path d="{_path(thin(smooth), across, up)}" {pen} stroke-width="2.2"/>',
    ]


class _Axis:
    """From values to places between two ends, with ticks; a range of nothing gets room on both sides."""

    def __init__(self, low: float, high: float, start: float, end: float, *, integer: bool = False):
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            room = 1.0 if integer else abs(high) / 2 or 1.0
        else:
            room = 0.05 * (high - low)
        self.low, self.high, self.start, self.end = low - room, high + room, start, end
        ticks = MaxNLocator(5, integer=integer).tick_values(self.low, self.high)
        self.ticks = [0.0 if abs(tick) < 1e-12 * room else tick for tick in ticks if self.low <= tick <= self.high]

    def place(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.low) / (self.high - self.low)


def _path(line: Curve, across: _Axis, up: _Axis) -> str:
    """Its points joined, with gaps where there is no value."""
    joined, pen = [], "M"
    for step, value in zip(*line, strict=True):
        if np.isnan(value):
            pen = "M"
        else:
            joined.append(f"{pen}{across.place(step):.1f} {up.place(value):.1f}")
            pen = "L"
    return "".join(joined)


def _windowed(values: np.ndarray, window: int) -> np.ndarray:
    """Sums over `window` entries centred on each entry, as far as there are any."""
    half = window // 2
    total = np.concatenate([[0.0], values.cumsum()])
    places = np.arange(len(values))
    return total[np.minimum(places + half + 1, len(values))] - total[np.maximum(places - half, 0)]
