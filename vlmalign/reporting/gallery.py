"""`write_galleries`: films of a set with what each state of an answers entry said of them, to be filtered by kind of error
and by label.

    galleries/ENTRY/SET.html

Of a set of label lists at most MOST films are shown. The rule: the films in the order of a hash of the study's seed and
their identifier; then in turn for every kind of verdict, and within it every state, the first film that is not chosen yet.
So rare verdicts are there as well as frequent ones, and how many films of a kind a page has says nothing about how often
it occurs: the counts over all films stand beside.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from vlmalign.reporting import filter_script
from vlmalign.reporting.boards import title
from vlmalign.reporting.examples import Example, example, films
from vlmalign.reporting.pages import environment, stylesheet, write_page
from vlmalign.reporting.record import Entry, Row, Run, inner
from vlmalign.reporting.styles import stage_styles

FOLDER = "galleries"
MOST = 48  # films on a page: about 1 MB
#: kind of verdict -> how it is written; an answer that is not valid names nothing, and has no other kind
KINDS = {
    "exact": "exact",
    "missed": "missed a finding",
    "alarm": "false alarm",
    "invalid": "not valid",
    "unknown": "unknown names",
}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class Gallery(NamedTuple):
    """A page that has been written."""

    title: str
    file: str  #: relative to the run folder
    films: int
    of: int


class Shown(NamedTuple):
    """An answer on a page, and what it is found by."""

    answer: Example
    kinds: tuple[str, ...]
    true: list[int]  #: places of labels, as are those below
    named: list[int]
    missed: list[int]
    alarm: list[int]


def write_galleries(run: Run) -> list[Gallery]:
    """Write the pages of every entry of label lists that has been scored, and remove those of entries that are gone."""
    written = [
        _write(run, entry, dataset, place)
        for entry in run.entries
        if entry.scores is not None
        for place, (dataset, results) in enumerate(entry.scores.results.items())
        if any("blocks" in each for each in results.values())
    ]
    found = [page for page in written if page is not None]
    kept = {run.path / page.file for page in found}
    for path in run.path.glob(f"{FOLDER}/*/*.html"):
        if path not in kept:
            path.unlink()
    return found


def kinds_of(row: Row) -> tuple[str, ...]:
    """The kinds of verdict that a prediction row of a label list has, of KINDS.

    >>> kinds_of({"valid": True, "truth": ["Edema"], "predicted": ["Fracture"], "unknown": []})
    ('missed', 'alarm')
    """
    if not row["valid"]:
        return ("invalid",)
    truth, predicted, unknown = set(row["truth"]), set(row["predicted"]), bool(row.get("unknown"))
    exact = truth == predicted and not (unknown and not predicted)
    held = {"exact": exact, "missed": truth - predicted, "alarm": predicted - truth, "unknown": unknown}
    return tuple(kind for kind in KINDS if held.get(kind))


def choose_films(rows: Iterable[Row], seed: int, most: int = MOST) -> list[str]:
    """The identifiers of the films to show, by the rule at the top of this file."""

    def by_hash(row: Row) -> bytes:
        return hashlib.sha256(f"{seed} {row['id']}".encode("utf-8", "replace")).digest()

    queues: dict[tuple[int, str], list[str]] = {}  # first in the order of KINDS, then of states as they come
    for row in sorted(rows, key=by_hash):
        for kind in kinds_of(row):
            queues.setdefault((list(KINDS).index(kind), row["stage"]), []).append(row["id"])
    waiting = [iter(queues[cell]) for cell in sorted(queues)]
    chosen: dict[str, None] = {}
    while waiting and len(chosen) < most:
        for queue in list(waiting):
            new = next((id for id in queue if id not in chosen), None)
            if new is None:
                waiting.remove(queue)
            elif len(chosen) < most:
                chosen[new] = None
    return list(chosen)


def question(run: Run, entry: str) -> str:
    """What the answers of an entry were asked, as the study has it; empty where it does not say it."""
    tasks = inner(run.settings, "tasks")
    only = next(iter(tasks)) if isinstance(tasks, Mapping) and len(tasks) == 1 else ""
    return str(inner(tasks, str(inner(run.settings, "answers", entry, "task") or only), "prompt") or "")


def _write(run: Run, entry: Entry, dataset: str, place: int) -> Gallery | None:
    rows = [row for row in entry.predictions if row["dataset"] == dataset and not row.get("sample")]
    rows = [row for row in rows if _is_labels(row.get("truth")) and _is_labels(row.get("predicted"))]
    if not rows:
        return None
    styles = stage_styles(run)
    states = sorted({row["stage"] for row in rows}, key=lambda state: (run.place(state), state))
    labels = _labels(entry, dataset)
    by_case: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_case.setdefault(row["id"], {})[row["stage"]] = row
    seed = run.settings.get("seed") or 0
    chosen, film = choose_films(rows, seed), films(run.path)
    cases = {
        id: [_shown(by_case[id][state], labels, film) for state in states if state in by_case[id]] for id in chosen
    }
    name = title(run, entry, dataset)
    page = (
        environment()
        .get_template("gallery.html")
        .render(
            run=run.path.resolve().name,
            title=name,
            entry=entry.name,
            css=stylesheet("report.css", "gallery.css"),
            script=filter_script,
            question=question(run, entry.name),
            cases=cases,
            of=len(by_case),
            seed=seed,
            most=MOST,
            kinds=KINDS,
            labels=labels,
            states=states,
            marks={state: styles[state].mark for state in states},
            counts=_counts(rows),
            sizes=Counter(row["stage"] for row in rows),
            samples=any(row.get("sample") is not None for row in rows),
        )
    )
    file = f"{FOLDER}/{entry.name}/{dataset if _NAME.fullmatch(dataset) else f'set-{place + 1}'}.html"
    (run.path / file).parent.mkdir(parents=True, exist_ok=True)
    write_page(run.path / file, page)
    return Gallery(name, file, len(chosen), len(by_case))


def _is_labels(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _labels(entry: Entry, dataset: str) -> list[str]:
    """Of the largest block of a data set."""
    assert entry.scores is not None
    results = entry.scores.results[dataset].values()
    blocks = [block["labels"] for each in results for block in each.get("blocks", {}).values()]
    return max(blocks, key=len)


def _counts(rows: Sequence[Row]) -> Mapping[tuple[str, str], int]:
    """(state, kind) -> answers, of all films."""
    return Counter((row["stage"], kind) for row in rows for kind in kinds_of(row))


def _shown(row: Row, labels: Sequence[str], film: Any) -> Shown:
    truth, predicted = set(row["truth"]), set(row["predicted"])

    def places(chosen: set[str]) -> list[int]:
        return [place for place, label in enumerate(labels) if label in chosen]

    valid = row["valid"]  # what is not valid names nothing, and its misses are not of reading
    missed = truth - predicted if valid else set()
    return Shown(
        example(row, {}, film),
        kinds_of(row),
        places(truth),
        places(predicted),
        places(missed),
        places(predicted - truth),
    )
