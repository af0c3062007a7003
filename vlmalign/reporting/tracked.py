"""What a stage's evaluations tracked, set by set, beside what its updates measured: small multiples over the same steps.

In-schema and cross-schema F1, reasoning, form and length of greedy answers, then reward or loss, KL and entropy: whether
one rises while another falls is seen at a glance. Stages that answer no label lists have no such figure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from markupsafe import Markup

from vlmalign.reporting.curves import Curve, Drawn, columns, curve, lines_figure
from vlmalign.reporting.record import Stage
from vlmalign.reporting.words import measured

#: number of an evaluation -> title and meaning
OF_SETS = {
    "macro_f1": ("macro-F1", "of greedy answers, mean over labels"),
    "micro_f1": ("micro-F1", "of greedy answers, all labels together"),
    "reasoning_named": ("reasoning: named", "of the solution's labels, share in the reasoning"),
    "reasoning_kept": ("reasoning: kept", "of labels in the reasoning, share in the solution"),
    "valid": ("valid", "share of answers in the required form"),
    "length": ("length", "mean length of an answer, tokens"),
}
#: number of an update -> title and meaning
OF_UPDATES = {
    "reward": ("reward", "mean over the sampled answers of an update"),
    "loss": ("loss", "cross-entropy of the answer, nat per token"),
    "kl": ("KL", "nat per token: how far from the reference model"),
    "entropy": ("entropy", "nat per token: how undecided the model is"),
}
#: how the sets of a figure look, in their order
LOOKS = (("--sft", ""), ("--grpo", "7 3"), ("--dpo", "2 3"), ("--ppo", "9 3 2 3"), ("--base", "4 4"))


class Panel(NamedTuple):
    """One of the small multiples."""

    title: str
    meaning: str
    svg: Markup


class Tracked(NamedTuple):
    """The figure of one stage."""

    legend: dict[str, Markup]  #: set -> how its line looks
    panels: list[Panel]
    columns: frozenset[str]  #: of the metrics, that are drawn in it


def tracked(stage: Stage, colour: str) -> Tracked | None:
    """The figure, or None for a stage whose evaluations measured no F1 of labels. `colour` is that of updates."""
    sets = [name.removesuffix("/macro_f1") for name in columns(stage.metrics) if name.endswith("/macro_f1")]
    if not sets:
        return None
    looks = {name: LOOKS[place % len(LOOKS)] for place, name in enumerate(sets)}
    panels, used = [], set()
    wanted = {key: {name: f"{name}/{key}" for name in sets} for key in OF_SETS} | {key: {"": key} for key in OF_UPDATES}
    for key, places in wanted.items():
        found = {name: line for name, column in places.items() if (line := curve(stage.metrics, column)) is not None}
        if found:
            title, meaning = (OF_SETS | OF_UPDATES)[key]
            panels.append(Panel(title, meaning, _panel(title, found, looks, colour, stage)))
            used |= set(places.values())
    legend = {name: _mark(*look) for name, look in looks.items()}
    return Tracked(legend, panels, frozenset(used))


def _panel(
    title: str, found: Mapping[str, Curve], looks: Mapping[str, tuple[str, str]], colour: str, stage: Stage
) -> Markup:
    drawn = []
    for name, line in found.items():
        variable, dash = looks.get(name, ("", ""))
        drawn.append(Drawn(line, f"var({variable})" if variable else colour, dash))
    ends = ", ".join(f"{name} {_ends(line)}".strip() for name, line in found.items())
    alt = f"{stage.name}, {title} over {stage.updates} steps, first and last: {ends}."
    return lines_figure(drawn, alt, first=stage.metrics[0]["step"], last=stage.updates)


def _ends(line: Curve) -> str:
    known = [value for value in line.values if value == value]
    return f"{measured(known[0])} to {measured(known[-1])}"


def _mark(variable: str, dash: str) -> Markup:
    broken = f' stroke-dasharray="{dash}"' if dash else ""
    line = f'<path d="M0 7H34" stroke="var({variable})" stroke-width="2.2"{broken}/>'
    return Markup(f'<svg class="mark wide" viewBox="0 0 34 14" aria-hidden="true">{line}</svg>')
