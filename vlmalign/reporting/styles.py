"""How each stage looks in every figure: a colour by its kind, and a marker that no other stage of the run has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.markers import MarkerStyle

from vlmalign.reporting.record import Entry, Run
from vlmalign.reporting.svg import BASE, CARD, DPO, GRPO, PPO, SFT

_KINDS = {"sft": (SFT, "s"), "dpo": (DPO, "^"), "grpo": (GRPO, "D"), "ppo": (PPO, "v"), "adapter": (BASE, "p")}
_OTHER = (BASE, "o")
_SPARE = "Xh<>P*"  #: for the third stage of a kind and those after it
_VARIABLES = {BASE: "--base", SFT: "--sft", DPO: "--dpo", GRPO: "--grpo", PPO: "--ppo"}


class Style(NamedTuple):
    """A marker, filled or hollow, and its colour."""

    colour: str
    marker: str
    filled: bool = True

    def draw(
        self,
        axes: Axes,
        x: float | Iterable[float],
        y: float | Iterable[float],
        size: float = 5.5,
        label: str | None = None,
    ) -> None:
        """The marker at one place or several; `label` is for a legend."""
        axes.plot(
            x,
            y,
            linestyle="none",
            marker=self.marker,
            markersize=size,
            markerfacecolor=self.colour if self.filled else CARD,
            markeredgecolor=self.colour,
            markeredgewidth=1.4,
            clip_on=False,
            label=label,
        )

    @property
    def css(self) -> str:
        """Its colour as a page names it."""
        return f"var({_VARIABLES[self.colour]})"

    @property
    def mark(self) -> Markup:
        """The marker as an `<svg>` for legends and text."""
        look = f'fill="{self.css if self.filled else "var(--card)"}" stroke="{self.css}" stroke-width="1.5"'
        if self.marker == "o":
            shape = f'<circle cx="7" cy="7" r="4" {look}/>'
        else:
            style = MarkerStyle(self.marker)
            points = style.get_path().transformed(style.get_transform()).vertices[:-1]
            path = "L".join(f"{7 + 8.5 * x:.1f} {7 - 8.5 * y:.1f}" for x, y in points)
            shape = f'<path d="M{path}Z" {look}/>'
        return Markup(f'<svg class="mark" viewBox="0 0 14 14" aria-hidden="true">{shape}</svg>')


BASELINE = Markup(
    '<svg class="mark" viewBox="0 0 14 14" aria-hidden="true">'
    '<path d="M7 0V14" stroke="var(--ink)" stroke-width="2.5"/></svg>'
)


def stage_styles(run: Run) -> dict[str, Style]:
    """State (`sft`, or `sft@last` where it was scored) -> style."""
    kinds = {stage.name: stage.kind for stage in run.stages}
    states = [*kinds, *(state for entry in run.entries for state in _states(entry))]
    return set_styles((state, kinds.get(state.partition("@")[0], "model")) for state in dict.fromkeys(states))


def set_styles(names: Iterable[tuple[str, str]]) -> dict[str, Style]:
    """Styles for (name, kind) pairs, no two alike until a kind has fourteen of them."""
    found: dict[str, Style] = {}
    seen: dict[str, int] = {}
    for name, kind in names:
        colour, marker = _KINDS.get(kind, _OTHER)
        place = seen[marker] = seen.get(marker, -1) + 1
        markers = marker + _SPARE
        found[name] = Style(colour, markers[place // 2 % len(markers)], filled=place % 2 == 0)
    return found


def _states(entry: Entry) -> Iterable[str]:
    yield from (row["stage"] for row in entry.predictions)
    for results in entry.scores.results.values() if entry.scores else ():
        yield from results
