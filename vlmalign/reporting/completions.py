"""`write_completions`: the completions log of each stage becomes pages to browse: an index, and tables step by step.

    <stage>/completions.jsonl                  read
    <stage>/completions.html                   the mean reward as a curve; one line a step: means, counts, a link
    <stage>/completions/step_000012.html       a table for each prompt of the step
    <stage>/completions/step_000012_2.html     more prompts of it, where one page would hold too much

Nothing is left out: a step too large for one page has several. Pages hold no date, and the same log gives the same
pages. Whatever a model wrote is escaped (visible_text.py); images are linked to (image_links.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from vlmalign.reporting import sort_script, words
from vlmalign.reporting.completion_figures import Figures, figures, mean, part_names
from vlmalign.reporting.completion_rows import (
    Completion,
    CompletionFile,
    PromptGroup,
    Step,
    open_log,
    read_steps,
)
from vlmalign.reporting.curves import curve, curve_figure
from vlmalign.reporting.image_links import ImageLink, image_links
from vlmalign.reporting.pages import environment, stylesheet, write_page
from vlmalign.reporting.visible_text import plain

LOG = "completions.jsonl"
MOST_COMPLETIONS = 512  # on a page: 1 MB of HTML when a completion has 1,100 characters
MOST_CHARACTERS = 2_000_000  # on a page, prompts and completions
LONG = 1_200  # characters; a longer completion is folded
START, END = 420, 240  # characters of a folded completion that show
_STEP_PAGE = re.compile(r"step_\d{6,}(_\d+)?\.html")


class StagePages(NamedTuple):
    """The pages of one stage."""

    folder: str  #: of the stage, relative to the run folder
    index: Path
    steps: int
    completions: int
    parts: list[str]  #: the components of its rewards


class IndexRow(NamedTuple):
    """A step in the index."""

    number: int
    files: list[str]  #: its pages, relative to the stage's folder
    figures: Figures


class Cell(NamedTuple):
    """A number in a table: as it is sorted by (None: not there), and as it is read."""

    value: float | None
    words: str
    problem: bool = False


@dataclass(frozen=True)
class Text:
    """A completion as it is shown: whole, or a start and an end that unfold."""

    whole: str

    @property
    def folded(self) -> bool:
        return len(self.whole) > LONG

    @property
    def start(self) -> str:
        return self.whole[:START]

    @property
    def end(self) -> str:
        return self.whole[-END:]

    @property
    def between(self) -> int:
        return len(self.whole) - START - END


def write_completions(run: Path, folders: Sequence[str]) -> list[StagePages]:
    """Write the pages of every stage that has a log, and remove those of steps it no longer has.

    `folders` are those of the stages, relative to the run folder `run`. Raises ValueError, naming file and line, if a
    log is damaged elsewhere than in a last line that breaks off; the pages of the steps before it have been written by
    then, and those of an earlier report remain.
    """
    return [_write_stage(run, folder) for folder in folders if (run / folder / LOG).is_file()]


def _write_stage(run: Path, name: str) -> StagePages:
    log = open_log(run / name / LOG)
    folder = run / name / "completions"
    templates = environment()
    shared = {
        "run": run.resolve().name,
        "stage": log.path.parent.name,
        "report": "../" * len(Path(name).parts) + "report.html",
        "css": stylesheet("report.css", "completions.css"),
    }
    link = image_links(run, folder)
    rows = []
    for before, step, after in _with_neighbours(read_steps(log)):
        pages = _step_pages(templates.get_template("completions_step.html"), before, step, after, link, shared)
        folder.mkdir(exist_ok=True)
        for file, page in pages.items():
            write_page(folder / file, page)
        rows.append(IndexRow(step.number, [f"{folder.name}/{file}" for file in pages], figures(step.groups)))
    index = log.path.with_name("completions.html")
    names = list(dict.fromkeys(part for row in rows for part in row.figures.parts))
    write_page(index, _index(templates.get_template("completions_index.html"), log, rows, names, shared))
    _remove_others(folder, {Path(file).name for row in rows for file in row.files})
    return StagePages(name, index, len(rows), sum(row.figures.completions for row in rows), names)


def _index(
    template: jinja2.Template,
    log: CompletionFile,
    rows: Sequence[IndexRow],
    names: Sequence[str],
    shared: Mapping[str, str],
) -> str:
    line = curve([{"step": row.number, "reward": row.figures.reward} for row in rows], "reward")
    return template.render(
        **shared,
        log=LOG,
        torn=log.torn,
        rows=rows,
        curve=None if line is None else curve_figure(line, "Mean reward", "var(--grpo)"),
        names=names,
        total={
            name: sum(getattr(row.figures, name) for row in rows)
            for name in ("prompts", "completions", "unscored", "flat")
        },
    )


def _step_pages(
    template: jinja2.Template,
    before: int | None,
    step: Step,
    after: int | None,
    link: Callable[[str], ImageLink],
    shared: Mapping[str, str],
) -> dict[str, str]:
    """File name -> page, for all pages of a step."""
    split = _split(step.groups)
    pages = {_file(step.number, number): figures(groups) for number, groups in enumerate(split, start=1)}
    names = part_names(one for group in step.groups for one in group.completions)
    firsts = accumulate((len(groups) for groups in split), initial=1)
    return {
        file: template.render(
            **shared,
            script=sort_script,
            step=step.number,
            before=None if before is None else (before, _file(before, 1)),
            after=None if after is None else (after, _file(after, 1)),
            figures=figures(step.groups),
            file=file,
            pages=pages,
            names=names,
            headings=["reward", *map(plain, names), "advantage", "tokens", ""],
            groups=[_group(group, names, first + place, link) for place, group in enumerate(groups)],
        )
        for file, first, groups in zip(pages, firsts, split, strict=False)
    }


def _group(group: PromptGroup, names: Sequence[str], place: int, link: Callable[[str], ImageLink]) -> dict[str, Any]:
    return {
        "place": place,  # among the prompts of the step, from 1
        "id": group.prompt_id,
        "prompt": group.prompt,
        "images": [link(key) for key in group.images],
        "columns": {name: words.in_words(value) for name, value in group.columns.items()},
        "flat": group.flat,
        "unscored": group.unscored,
        "mean": mean(group.rewards),
        "lowest": min(group.rewards, default=None),
        "highest": max(group.rewards, default=None),
        "rows": [(one.sample, _cells(one, names), Text(one.text)) for one in group.completions],
    }


def _cells(one: Completion, names: Sequence[str]) -> list[Cell]:
    """In the order of the headings: reward, components, advantage, tokens, how it ended."""
    return [
        Cell(None, "unscored", problem=True) if one.reward is None else _cell(one.reward),
        *(_cell(one.parts.get(name), one.nonfinite.get(f"parts.{name}")) for name in names),
        _cell(one.advantage, one.nonfinite.get("advantage")),
        Cell(one.tokens, words.count(one.tokens)),
        Cell(int(one.stopped), "stopped" if one.stopped else "cut off", problem=not one.stopped),
    ]


def _cell(value: float | None, nonfinite: str | None = None) -> Cell:
    if nonfinite:
        return Cell(None, nonfinite, problem=True)
    return Cell(value, words.measured(None if value is None else value + 0.0))  # + 0.0: no minus before a zero


def _split(groups: Sequence[PromptGroup]) -> list[list[PromptGroup]]:
    """The groups of a step by page. A group is never divided, however large."""
    pages: list[list[PromptGroup]] = [[]]
    completions = characters = 0
    for group in groups:
        size = len(group.completions)
        length = len(group.prompt) + sum(len(one.text) for one in group.completions)
        if pages[-1] and (completions + size > MOST_COMPLETIONS or characters + length > MOST_CHARACTERS):
            pages.append([])
            completions = characters = 0
        pages[-1].append(group)
        completions += size
        characters += length
    return pages


def _file(step: int, page: int) -> str:
    return f"step_{step:06d}.html" if page == 1 else f"step_{step:06d}_{page}.html"


def _with_neighbours(steps: Iterator[Step]) -> Iterator[tuple[int | None, Step, int | None]]:
    """Each step between the numbers of the one before and the one after it; holds two steps at a time."""
    before: int | None = None
    for step, after in pairwise(chain(steps, [None])):
        assert step is not None
        yield before, step, None if after is None else after.number
        before = step.number


def _remove_others(folder: Path, written: set[str]) -> None:
    """Pages of an earlier report whose steps the log has no more: a run that was rewound. Other files stay."""
    for path in folder.glob("step_*.html"):
        if path.name not in written and _STEP_PAGE.fullmatch(path.name):
            path.unlink()
