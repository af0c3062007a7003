"""Sets that a study learns from must share nothing with those it is measured on: no patient, film, copy or question."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from vlmalign.data.overlap.sets import SetMarks, describe, overlaps
from vlmalign.data.overlap.texts import marks_of_text
from vlmalign.data.records.records import Records
from vlmalign.data.sources.rows import Rows
from vlmalign.studies.engine.config import StudyConfig, set_ref
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.record import MADE
from vlmalign.studies.engine.sets import TWIN
from vlmalign.studies.engine.stage_config import Stage


def check_overlaps(study: Opened, stages: Iterable[str]) -> None:
    """Raises ValueError naming each set that one of these stages learns from and that overlaps one it is measured on.

    Sets that say so (`may_overlap`) may share what they share. Sets that have not been drawn are compared when they are.
    """
    marks: dict[str, SetMarks] = {}

    def of(ref: str) -> SetMarks:
        if ref not in marks:
            marks[ref] = _marks(study, ref)
        return marks[ref]

    problems = [
        describe(found, of(training), of(measured))
        for training, measured in sorted(set(_pairs(study.config, stages)))
        if _drawn(study.config, training) and _drawn(study.config, measured)
        if (found := overlaps(of(training), of(measured)))
    ]
    if problems:
        raise ValueError("\n".join(problems))


def _pairs(config: StudyConfig, stages: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(set that is learnt from, set that is measured on) of every stage and of the answers of states after it."""
    answered = [ref for entry in config.answers.values() for ref in entry.sets]
    for name in stages:
        stage = config.stages[name]
        if not isinstance(stage, Stage):
            continue
        held_out = () if stage.validation is None else (*stage.validation.data.sets, *stage.validation.watch)
        for learnt in (ref for data in stage.learns_from.values() for ref in data.sets):
            yield from ((learnt, ref) for ref in (*held_out, *answered) if not _allowed(config, learnt, ref))


def _drawn(config: StudyConfig, ref: str) -> bool:
    return (config.run / "sets" / set_ref(ref).name / MADE).exists()


def _allowed(config: StudyConfig, one: str, other: str) -> bool:
    def names(ref: str) -> set[str]:
        return {set_ref(each).name for each in config.sets[set_ref(ref).name].may_overlap}

    return set_ref(one).name in names(other) or set_ref(other).name in names(one)


def _marks(study: Opened, ref: str) -> SetMarks:
    section = study.config.sources[study.config.sets[set_ref(ref).name].from_]
    cases = study.cases(ref)
    rows: list[dict[str, Any]] = [
        {key: row[key] for key in ("id", "patient", "sha256", "dhash") if key in row} for row in cases.rows
    ]
    if isinstance(cases.source, Records):
        rows = [{"id": row["id"], "patient": row["patient"], "question": row[TWIN], "grams": ()} for row in cases.rows]
    if isinstance(cases.source, Rows):
        rows = [{"id": row["id"], "patient": row["patient"]} | _question(cases[i].meta) for i, row in enumerate(rows)]
    where = section.path if isinstance(cases.source, Records) else getattr(section, "root", None) or section.path
    return SetMarks(ref, f"{section.kind} {study.config.place(where).resolve()}", rows)


def _question(row: Any) -> dict[str, Any]:
    """The marks of what a row asks, where it asks something of its own."""
    turns = row.get("messages") or (row.get("prompt") if isinstance(row.get("prompt"), list) else None)
    if turns is None:
        text = row.get("question") or row.get("prompt")
        return marks_of_text(text)._asdict() if isinstance(text, str) else {}
    if any(
        not isinstance(turn["content"], str) and any(part["type"] == "image" for part in turn["content"])
        for turn in turns
    ):
        return {}  # one question may be asked of every film
    asked = [turn["content"] for turn in turns if turn["role"] == "user" and isinstance(turn["content"], str)]
    return marks_of_text("\n".join(asked))._asdict() if asked else {}
