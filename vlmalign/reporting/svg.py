"""From a matplotlib figure to SVG that lives inside a page, or in a file: its text, its theme, no identifiers that clash.

Lengths are in SVG units; the page scales a figure to the width it has, about one unit to the CSS pixel.
Text stays text (selectable, in the page's font). Colours are names of CSS variables, so that one figure serves the
light page, the dark page and print. Stages are also told apart by their markers (styles.py).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

POINTS = 72  # matplotlib's inch in SVG units
FONT = 11.5

# What matplotlib is told -> what the page fills in. The left side only has to be unique.
INK, FAINT, BAND, CARD = "#101010", "#808081", "#f0f0f1", "#fdfdfe"
BASE, SFT, GRPO, DPO, PPO = "#6e7682", "#0072b3", "#c44e01", "#007a50", "#8a4a9e"
_THEME = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    BAND: "var(--band)",
    BASE: "var(--base)",
    SFT: "var(--sft)",
    GRPO: "var(--grpo)",
    DPO: "var(--dpo)",
    PPO: "var(--ppo)",
    CARD: "var(--card)",
}

_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vlmalign",  # without it, identifiers differ from one run to the next
    "text.parse_math": False,  # a label may hold a dollar sign
    "font.size": FONT,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so layout is the same everywhere
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.35,
    "axes.axisbelow": True,
}


class Canvas(NamedTuple):
    """A figure and its one set of axes."""

    figure: Figure
    axes: Axes
    width: float  #: of the figure, SVG units, as is the height
    height: float


@contextmanager
def canvas(width: float, height: float, *, left: float, right: float, top: float, bottom: float) -> Iterator[Canvas]:
    """A figure in the house's settings; the margins around its axes are in SVG units too. Finish it inside."""
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(width / POINTS, height / POINTS))
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
        yield Canvas(figure, figure.add_axes(box), width, height)


def svg_file(figure: Figure, alt: str) -> str:
    """The figure as the text of an SVG file, in the colours of the light page on white; `alt` is its title."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        facecolor="white",
        metadata={"Date": None, "Creator": None, "Title": alt, "Description": alt},
    )
    return buffer.getvalue()


def inline_svg(figure: Figure, name: str, alt: str) -> Markup:
    """The figure as an `<svg>` element that says `alt` to a screen reader. `name` is unique on the page."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box, "matplotlib writes a viewBox"
    # a group's name serves nobody here; what is referred to keeps a name that no other figure has
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{name}-", body)
    body = body.replace("xlink:href=", "href=")
    for colour, variable in _THEME.items():
        body = body.replace(colour, variable)
    label = escape(alt)
    return Markup(f'<svg xmlns="http://www.w3.org/2000/svg" {box[0]} role="img" aria-label="{label}">{body.strip()}')
