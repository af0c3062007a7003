"""`analysis.html`, one page that needs no other file, no script and no network, and `analysis.json` with all its numbers.

Files of a study with simulated votes begin with `simulated-`, and the page's title says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from vlmalign.reporting.pages import environment, stylesheet, write_page
from vlmalign.review.analysis import figures
from vlmalign.review.analysis.methods import methods, warnings
from vlmalign.review.protocol import Protocol

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


def write_analysis(found: Mapping[str, Any], protocol: Protocol, folder: Path) -> list[Path]:
    """Write both files into `folder`, over those of an earlier analysis; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "simulated-" if found["simulated"] else ""
    page, numbers = folder / f"{prefix}analysis.html", folder / f"{prefix}analysis.json"
    write_page(numbers, json.dumps({**found, "methods": methods(found, protocol)}, ensure_ascii=False, indent=1) + "\n")
    write_page(page, render(found, protocol))
    return [page, numbers]


def render(found: Mapping[str, Any], protocol: Protocol) -> str:
    """The page as text."""
    styles = figures.arm_styles(found["arms"])
    points = {row["arm"]: row["points"] for row in found["shares"]}
    shares = figures.shares_figure(found["shares"], styles, "shares") if found["shares"] else None
    decoupling = None
    if found["accuracy"] and points:
        accuracy = found["accuracy"]
        decoupling = figures.decoupling_figure(accuracy["arms"], accuracy["name"], points, styles, "decoupling")
    words = {outcome["key"]: outcome["words"] for outcome in found["ordinal"]} | {"preference": "Preference"}
    return (
        _environment()
        .get_template("analysis.html")
        .render(
            found=found,
            title=f"Simulated: {found['title']}" if found["simulated"] else found["title"],
            css=stylesheet("report.css"),
            warnings=warnings(found),
            methods=methods(found, protocol),
            marks={arm: style.mark for arm, style in styles.items()},
            shares_figure=shares,
            decoupling=decoupling,
            words=words,
        )
    )


def _environment() -> jinja2.Environment:
    made = environment(TEMPLATES)
    made.filters["ratio"] = _ratio
    return made


def _ratio(log_odds: float | None) -> str:
    """A log odds as an odds ratio, three significant digits.

    >>> _ratio(0.0), _ratio(None)
    ('1', '')
    """
    return "" if log_odds is None else f"{math.exp(min(log_odds, 700.0)):.3g}"
