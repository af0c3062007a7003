"""Reads what a study shows, from run folders or JSON Lines, and checks it: ids, answers to every case, films in their folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from vlmalign.reporting.image_places import image_places
from vlmalign.reporting.json_files import read_rows
from vlmalign.reporting.json_shape import Maybe
from vlmalign.review.material import Answer, Case, Film, Known, Material, Slot, Study
from vlmalign.review.protocol import Cases, FileArm, Protocol, RunArm, load_protocol, names
from vlmalign.review.rendering import form_counts, render

PREDICTION = {"id": str, "completion": str, "image": Maybe(str)}
LISTED = 5  #: ids in a message


def load_study(path: Path) -> Study:
    """The protocol in a YAML file with all that it names. Raises ConfigError, and ValueError as `load_material` does."""
    protocol = load_protocol(path)
    return Study(protocol, load_material(protocol))


def load_material(protocol: Protocol) -> Material:
    """Everything that the protocol names, read and checked.

    Raises:
        ValueError: for missing files, ids that stand twice, cases without an answer (unless they are to be skipped),
            arms with the same answers throughout, films outside their folder.
    """
    texts, films_of_runs = _arms(protocol)
    cases = _cases(protocol.cases) if protocol.cases else _film_cases(films_of_runs)
    cases, left_out = _answered(protocol, cases, texts)
    slots = [
        Slot(name, protocol.arms[name].guess.strip(), {case: own[case] for case in cases})
        for name, own in texts.items()
    ]
    slots.sort(key=lambda slot: slot.digest)
    for one, other in pairwise(slots):
        if one.digest == other.digest:
            raise ValueError(
                f"arms {one.name!r} and {other.name!r} give the same answer to every case; readers could not tell them "
                "apart: give other answers, or leave one out"
            )
    known = _attention(protocol)
    if both := set(known) & set(cases):
        raise ValueError(f"attention cases need ids of their own; {_listed(both)} are cases of the study as well")
    return Material(cases, tuple(slots), known, tuple(left_out), tuple(_notes(protocol, cases, slots, left_out)))


def _arms(protocol: Protocol) -> tuple[dict[str, dict[str, Answer]], dict[str, str]]:
    """(arm -> case -> answer, case -> its film as a run names it)."""
    texts: dict[str, dict[str, Answer]] = {}
    films: dict[str, str] = {}
    for name, arm in protocol.arms.items():
        rows = _run_rows(arm) if isinstance(arm, RunArm) else _file_rows(arm)
        own: dict[str, Answer] = {}
        for case, text, author, film in rows:
            if case in own:
                raise ValueError(f"arm {name!r}: {case!r} is answered twice; keep one answer to a case")
            own[case] = Answer(render(protocol.rendering, text), author, form_counts(text))
            if film is not None:
                films[case] = film
        texts[name] = own
    return texts, films


def _run_rows(arm: RunArm) -> list[tuple[str, str, str | None, str | None]]:
    folder = arm.run / "answers" / arm.answers / arm.stage / arm.set
    path = folder / "predictions.jsonl"
    if not path.is_file():
        raise ValueError(
            f"expected answers in {path}, found no such file; `vlmalign status {arm.run}` lists what is there"
        )
    rows = [row for row in read_rows(path, PREDICTION) if row.get("sample", 0) == arm.sample]
    if not rows:
        raise ValueError(f"{path} holds no answer with sample {arm.sample}; choose another sample")
    place = image_places(arm.run)
    return [
        (row["id"], row["completion"], None, None if row["image"] is None else str(place(row["image"]))) for row in rows
    ]


def _file_rows(arm: FileArm) -> list[tuple[str, str, str | None, str | None]]:
    shape = {arm.id: (str, int), arm.answer: str} | ({arm.author: str} if arm.author else {})
    rows = read_existing(arm.path, shape)
    return [(str(row[arm.id]), row[arm.answer], row[arm.author] if arm.author else None, None) for row in rows]


def read_existing(path: Path, shape: Any) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file that must be there and must not be empty."""
    if not path.is_file():
        raise ValueError(f"no such file: {path}; paths are relative to the working directory, {Path.cwd()}")
    rows = read_rows(path, shape)
    if not rows:
        raise ValueError(f"{path} holds no rows")
    return rows


def _cases(section: Cases) -> dict[str, Case]:
    rows = read_existing(section.path, {section.id: (str, int), **dict.fromkeys(section.show, object)})
    found: dict[str, Case] = {}
    for row in rows:
        case = _case(section, row)
        if case.id in found:
            raise ValueError(f"{section.path}: id {case.id!r} stands twice; ids tell cases apart")
        found[case.id] = case
    return found


def _case(section: Cases, row: Mapping[str, Any]) -> Case:
    root = section.images or section.path.parent
    named = row.get(section.image) if section.image else None
    named = [named] if isinstance(named, str) else named or []
    films = tuple(_film(_inside(root, str(name))) for name in named)
    # The one column of a record needs no title: it is the record.
    plain = len(section.show) == 1
    record = tuple(
        ("" if plain else column.replace("_", " ").capitalize(), in_lines(row[column])) for column in section.show
    )
    return Case(str(row[section.id]), tuple((title, text) for title, text in record if text), films)


def in_lines(value: Any) -> str:
    """A JSON value as lines of text for a reader.

    >>> in_lines({"age": 31, "history": ["two cycles", "no birth"]})
    'age: 31\\nhistory:\\n  - two cycles\\n  - no birth'
    """
    if isinstance(value, Mapping):
        return "\n".join(_entry(f"{str(key).replace('_', ' ')}:", item) for key, item in value.items())
    if isinstance(value, list):
        return "\n".join(_entry("-", item) for item in value)
    return "" if value is None else str(value)


def _entry(mark: str, item: Any) -> str:
    text = in_lines(item)
    if not isinstance(item, Mapping | list):
        return f"{mark} {text}".rstrip()
    return f"{mark}\n" + "\n".join(f"  {line}" for line in text.split("\n"))


def _inside(root: Path, name: str) -> Path:
    path = (root / name).resolve()
    if not path.is_relative_to(root.resolve()):
        raise ValueError(f"film {name!r} lies outside {root}; set cases.images to the folder that holds the films")
    return path


def _film(path: Path) -> Film:
    if not path.is_file():
        raise ValueError(f"no such film: {path}")
    with path.open("rb") as file:
        return Film(path, hashlib.file_digest(file, "sha256").hexdigest())


def _film_cases(films: Mapping[str, str]) -> dict[str, Case]:
    if not films:
        raise ValueError("no answers of a run name films; give the cases: `cases: {path: cases.jsonl}`")
    return {case: Case(case, (), (_film(Path(path)),)) for case, path in films.items()}


def _answered(
    protocol: Protocol, cases: Mapping[str, Case], texts: Mapping[str, Mapping[str, Answer]]
) -> tuple[dict[str, Case], list[tuple[str, str]]]:
    kept, left_out = {}, []
    # In the order of ids, whatever order the rows come in.
    for name in sorted(cases):
        if lacking := [arm for arm, own in texts.items() if name not in own]:
            left_out.append((name, f"no answer from {', '.join(sorted(lacking))}"))
        else:
            kept[name] = cases[name]
    if left_out and protocol.design.on_missing == "error":
        counts = Counter(reason for _, reason in left_out)
        raise ValueError(
            f"{len(left_out)} of {len(cases)} cases lack an answer ({'; '.join(f'{n} {why}' for why, n in counts.items())}): "
            f"{_listed(case for case, _ in left_out)}. Give the answers, or set design.on_missing: skip"
        )
    if not kept:
        raise ValueError("no case has an answer from every arm; do cases and answers use the same ids?")
    return kept, left_out


def _attention(protocol: Protocol) -> dict[str, Known]:
    section = protocol.design.attention
    if section is None:
        return {}
    like = protocol.cases or Cases(path=section.path, show=())
    columns = like.model_copy(update={"path": section.path, "images": like.images})
    shape = {columns.id: (str, int), "answers": [str], "expected": int, **dict.fromkeys(columns.show, object)}
    found: dict[str, Known] = {}
    for row in read_existing(section.path, shape):
        case, texts = _case(columns, row), row["answers"]
        if len(texts) != protocol.design.answers or not 0 <= row["expected"] < len(texts):
            raise ValueError(
                f"{section.path}, {case.id!r}: expected {protocol.design.answers} answers, as design.answers says, and the "
                f"index of the better one (from 0), found {len(texts)} answers and {row['expected']}"
            )
        answers = tuple(Answer(render(protocol.rendering, text), None, form_counts(text)) for text in texts)
        if case.id in found:
            raise ValueError(f"{section.path}: id {case.id!r} stands twice")
        found[case.id] = Known(case, answers, row["expected"])
    if len(found) < section.each:
        raise ValueError(
            f"{section.path} holds {len(found)} attention cases, fewer than design.attention.each, {section.each}"
        )
    return found


def _notes(
    protocol: Protocol, cases: Mapping[str, Case], slots: list[Slot], left_out: list[tuple[str, str]]
) -> list[str]:
    notes = []
    if left_out:
        notes.append(f"{len(left_out)} cases are left out, since an arm does not answer them")
    for i, one in enumerate(slots):
        if empty := [case for case in cases if not one.answers[case].text]:
            notes.append(
                f"arm {one.name!r}: {len(empty)} of {len(cases)} answers are empty once rendered: {_listed(empty)}"
            )
        for other in slots[i + 1 :]:
            if same := [case for case in cases if one.answers[case].text == other.answers[case].text]:
                notes.append(
                    f"arms {one.name!r} and {other.name!r} give the same answer to {len(same)} of {len(cases)} cases, which "
                    f"are shown all the same and marked in the export: {_listed(same)}"
                )
    shown = {"title": protocol.title, "question": protocol.question, "instructions": protocol.instructions}
    for name in protocol.arms:
        count = sum(names(name, answer.text) for slot in slots for answer in slot.answers.values())
        if count:
            notes.append(
                f"{count} answers hold the word {name!r}, the name of an arm; see rendering.remove if it tells"
            )
        notes += [
            f"the {place} holds the word {name!r}, the name of an arm"
            for place, text in shown.items()
            if names(name, text)
        ]
        in_cases = sum(any(names(name, text) for _, text in case.record) for case in cases.values())
        if in_cases:
            notes.append(f"{in_cases} records hold the word {name!r}, the name of an arm")
    return notes


def _listed(ids: Any) -> str:
    ids = sorted(ids)
    return ", ".join(ids[:LISTED]) + (f" and {len(ids) - LISTED} more" if len(ids) > LISTED else "")
