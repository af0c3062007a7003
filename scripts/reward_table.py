"""Writes the tables of `docs/rewards.md`: 20 completions, and what every reward of labels gives each of them.

python scripts/reward_table.py            # after adding or changing a reward of labels
python scripts/reward_table.py --check    # only say whether the tables are up to date; exit code 1 if they are not
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any, NamedTuple

from generated_page import main, with_part

from vlmalign.rewards.runner import RewardRunner
from vlmalign.studies.engine.reward_config import TABLE, TableReward
from vlmalign.tasks.labels import LabelsTask

PAGE = Path(__file__).resolve().parent.parent / "docs" / "rewards.md"
BEGIN, END = "<!-- tables: written by scripts/reward_table.py -->", "<!-- end of tables -->"

FREQUENCY = {"No Finding": 0.4, "Lung Opacity": 0.3, "Edema": 0.2, "Fracture": 0.05, "Support Devices": 0.25}
TASK = LabelsTask(prompt="", labels=tuple(FREQUENCY), normal="No Finding")

#: the last 100 predictions before these: a label in more than 70 of them is dominant
BEFORE = [["No Finding"]] * 72 + [["Edema"]] * 28


class Case(NamedTuple):
    """One completion; `solution` stands in its block, and `text` is the whole of it where it is not of that form."""

    what: str
    solution: str | None
    truth: list[str]
    tokens: int = 500
    text: str | None = None

    @property
    def completion(self) -> str:
        return self.text or f"<think>...</think><solution>{self.solution}</solution>"


CASES = (
    Case("right", "Edema", ["Edema"]),
    Case("right, with text outside the blocks", None, ["Edema"], text="So: <think>...</think><solution>Edema</solution>"),
    Case("a parent beside its child", "Edema, Lung Opacity", ["Edema"]),
    Case("a parent in place of its child", "Lung Opacity", ["Edema"]),
    Case("a rare label missed", "Edema", ["Edema", "Fracture"]),
    Case("a frequent label missed", "Fracture", ["Edema", "Fracture"]),
    Case("a rare label too many", "Edema, Fracture", ["Edema"]),
    Case("a frequent label too many", "Edema, Support Devices", ["Edema"]),
    Case("wrong", "No Finding", ["Edema"]),
    Case("wrong and short", "No Finding", ["Edema"], tokens=100),
    Case("a clear film", "No Finding", ["No Finding"]),
    Case("a contradiction", "No Finding, Edema", ["Edema"]),
    Case("a clear film with devices", "No Finding, Support Devices", ["No Finding", "Support Devices"]),
    Case("both empty", "", []),
    Case("an empty answer", "", ["Edema"]),
    Case("an empty truth", "Edema", []),
    Case("an unknown name too many", "Edema, Flu", ["Edema"]),
    Case("an unknown name only, empty truth", "Flu", []),
    Case("a label twice", "Edema, edema", ["Edema"]),
    Case("right, without the blocks", None, ["Edema"], tokens=100, text="Edema"),
)  # fmt: skip

CONVENTIONS = {"nine": "chexpert9", "parents": {"Edema": ["Edema", "Lung Opacity"]}}

#: table -> heading -> kind and options
COLUMNS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "Between -1 and 1, and `macro_f1`": {
        "hard": ("hard", {}),
        "hard, f1": ("hard", {"measure": "f1"}),
        "hard, weighted": ("hard", {"frequency": FREQUENCY}),
        "labels": ("labels", {}),
        "labels, f1": ("labels", {"measure": "f1"}),
        "labels, weighted": ("labels", {"frequency": FREQUENCY}),
        "labels, normal": ("labels", {"normal": "No Finding"}),
        "macro_f1": ("macro_f1", {"frequency": FREQUENCY}),
        "robust": ("robust", {"conventions": CONVENTIONS}),
        "contradiction": ("contradiction", {"beside": ["Support Devices"]}),
        "format": ("format", {}),
        "length": ("length", {"low": 400}),
        "nv_reason_cxr": ("nv_reason_cxr", {}),
        "nv_reason_ct": ("nv_reason_ct", {}),
    },
    "In points": {
        "nuanced": ("nuanced", {"frequency": FREQUENCY}),
        "collapse": ("collapse", {}),
        "collapse, everyone": ("collapse", {"everyone": True}),
        "chexreason_nuanced": ("chexreason_nuanced", {"frequency": FREQUENCY}),
    },
}


def scores(kind: str, options: dict[str, Any]) -> list[float | None]:
    """What a reward, or a set of them, gives every case."""
    section = TableReward(kind=kind, options=options)
    columns = {"truth": [case.truth for case in CASES], "completion_tokens": [case.tokens for case in CASES]}
    with RewardRunner(section.build(kind, TASK), workers=0, strict=True) as runner:
        runner.set_state({name: {"window": BEFORE} for name in runner.get_state()})
        return runner.score([""] * len(CASES), [case.completion for case in CASES], columns).rewards


def tables() -> str:
    """The page's tables as Markdown.

    Raises:
        ValueError: for a kind of reward that reads labels and has no column.
    """
    shown = {kind for columns in COLUMNS.values() for kind, _ in columns.values()}
    if missing := [
        kind for kind in TABLE if "labels" in inspect.signature(TABLE[kind]).parameters and kind not in shown
    ]:
        raise ValueError(f"reward {missing[0]} reads labels and has no column; add one to COLUMNS")
    rows = [
        [str(number), case.what, f"`{case.text}`" if case.text else case.solution or "", ", ".join(case.truth), str(case.tokens)]
        for number, case in enumerate(CASES, 1)
    ]  # fmt: skip
    parts = [_markdown(["#", "case", "solution, or the whole text", "truth", "tokens"], rows)]
    for title, columns in COLUMNS.items():
        found = {heading: scores(kind, options) for heading, (kind, options) in columns.items()}
        rows = [[str(i + 1), *(_number(values[i]) for values in found.values())] for i in range(len(CASES))]
        parts.append(f"{title}:\n\n" + _markdown(["#", *(f"`{heading}`" for heading in found)], rows))
    return "\n\n".join(parts)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value + 0.0:.3f}".rstrip("0").rstrip(".")


def _markdown(heading: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [heading, ["---"] * len(heading), *rows])


def page_with(text: str) -> str:
    """`text` with the tables between its markers replaced.

    Raises:
        ValueError: when the markers are not there in order.
    """
    return with_part(text, PAGE, BEGIN, END, f"{tables()}\n")


if __name__ == "__main__":
    sys.exit(main(__doc__, PAGE, page_with, "reward_table"))
