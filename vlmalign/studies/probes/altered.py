"""The probe `altered`: the answers of an entry once more, to films from which something was taken.

What does not change by it does not rest on what was taken. Answers to altered films go the way of all answers; only the
reader of films is another, and for shuffled films the film that a case is asked about.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vlmalign.data.films.altered import AlteredFilms, alteration, other_patients
from vlmalign.evaluation.bootstrap import bootstrap_ratio
from vlmalign.evaluation.comparison import compare
from vlmalign.evaluation.metrics import score
from vlmalign.studies.engine.base import Base
from vlmalign.studies.engine.config import stage_ref
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.files import read_rows
from vlmalign.studies.engine.make import PREDICTIONS, Making, answered
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.probe_config import ROWS, AlteredProbe, folder_of
from vlmalign.studies.engine.score import subsets, voted

Row = dict[str, Any]


def measure(making: Making, base: Base) -> list[Row]:
    """The prediction rows of a state to altered films: as those of answers, with `films` (how they were altered) and for
    shuffled films `shown` (the case whose film it was)."""
    study, node = making.study, making.node
    probe: AlteredProbe = study.config.probes[node.key]
    entry = study.config.answers[probe.answers]
    task, data = study.task_of_answers(entry, node.set), Data(set=node.set)
    cases = study.cases(node.set)
    numbered, more = study.numbered(data), [{"films": node.variant} for _ in cases.rows]
    if node.variant == "shuffled":
        places = other_patients([row["patient"] for row in cases.rows], seed=study.config.seed)
        shown = [cases[int(place)] for place in places]
        numbered = (
            (number, replace(case, image=film.image)) for (number, case), film in zip(numbered, shown, strict=True)
        )
        more = [{**row, "shown": film.id} for row, film in zip(more, shown, strict=True)]
    found = study.questions(data, task, stage_ref(node.stage).name, numbered)
    alter = alteration(node.variant, width=probe.border)
    pictures = None if alter is None else AlteredFilms(base.front.pixels, lambda path: (path, alter))
    rows = answered(making, base, entry, task, found, pictures=pictures)
    return [{**row, **more[place // entry.samples]} for place, row in enumerate(rows)]


def results(study: Opened, name: str) -> list[Row]:
    """For each set and state the scores of the films as they are ("whole") and altered; of the latter also `differences`
    (altered - whole, see `comparison.compare`) and `same`, the share of cases with the same answer."""
    config = study.config
    probe: AlteredProbe = config.probes[name]
    entry = config.answers[probe.answers]
    found = []
    for ref in entry.sets:
        labels = study.cases(ref).labels
        bootstrap = {"draws": probe.draws, "seed": config.seed}
        blocks = subsets(labels, [study.cases(other).labels for other in entry.sets])
        task = study.task_of_answers(entry, ref)
        for stage in entry.stages:
            whole = voted(read_rows(config.run / "answers" / probe.answers / stage / ref / PREDICTIONS), entry)
            own = {"stage": stage, "dataset": ref}
            scores = score(task, whole, labels=labels, subsets=blocks, **bootstrap)
            found.append({**own, "films": "whole", "results": scores})
            for variant in probe.films:
                folder = config.run / "measured" / name / folder_of(stage, ref, variant)
                rows = voted(read_rows(folder / ROWS), entry)
                found.append(
                    {
                        **own,
                        "films": variant,
                        "results": score(task, rows, labels=labels, subsets=blocks, **bootstrap),
                        "differences": compare(whole, rows, blocks, **bootstrap),
                        "same": same_answers(whole, rows, **bootstrap),
                    }
                )
    return found


def same_answers(one: Sequence[Row], other: Sequence[Row], **bootstrap: Any) -> Row:
    """The share of cases with the same valid labels, or no valid answer, in both; with its interval by patients."""
    patients = [row["patient"] for row in one]
    same = [
        set(a["predicted"]) == set(b["predicted"]) and a["valid"] == b["valid"] for a, b in zip(one, other, strict=True)
    ]
    return bootstrap_ratio(same, [1] * len(same), patients, **bootstrap)._asdict()
