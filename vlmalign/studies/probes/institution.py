"""The probe `institution`: can a linear function of what the model makes of a film tell which set it comes from?

Two features of each film are measured: "tower", the mean of its soft tokens (behind the projector), and "prompt", the
decoder's state after film and question, from which an answer begins. Training leaves the tower as it is, so that its
features are those of the base whatever the state; what a stage changes shows in the decoder's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlmalign.distributed import own_share
from vlmalign.evaluation.linear_probe import ProbeScore, chance, linear_probe
from vlmalign.evaluation.prompt_states import prompt_states
from vlmalign.exchange import gather_from
from vlmalign.studies.engine.base import Base
from vlmalign.studies.engine.config import set_ref, stage_ref
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.files import read_rows
from vlmalign.studies.engine.make import Making, state_of
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.probe_config import ROWS, InstitutionProbe, folder_of

Row = dict[str, Any]

#: significant digits of features as they are written down
DIGITS = 6


def measure(making: Making, base: Base) -> list[Row]:
    """A row for each case: id, patient, and its features "tower" and "prompt"."""
    study, node = making.study, making.node
    probe: InstitutionProbe = study.config.probes[node.key]
    data = Data(set=node.set)
    found = study.questions(data, study.task(probe.task, data), stage_ref(node.stage).name)
    where = base.devices.sampling()
    policy = base.policy(state_of(study, base, node.parents["stage"]), where)
    making.progress.stage(f"features of {node.set}, {node.stage}", max(1, len(own_share(found.items))))

    def own() -> list[list[np.ndarray]]:
        share = own_share(found.groups)
        if not share:
            return []
        states = prompt_states(
            base.model(None), policy, share, features=base.features, budget=probe.tokens,
            mesh=None if where is None else where.mesh, advance=making.advance(),
        )  # fmt: skip
        towers = (base.features.features([group.images[0]])[0].mean(axis=0, dtype=np.float32) for group in share)
        return [[tower, state] for tower, state in zip(towers, states, strict=True)]

    return [
        {"id": case.id, "patient": case.patient, "tower": _written(tower), "prompt": _written(state)}
        for case, (tower, state) in zip(found.cases, gather_from(own), strict=True)
    ]


def results(study: Opened, name: str) -> list[Row]:
    """A row for each feature of each state (the tower's of each base), and for each control: {"stage", "features",
    "control", "n", "accuracy", "auroc", "majority"}.

    Controls: "labels", the truth alone in place of features; "shuffled", the same features with sets dealt out anew, as mean
    and spread of several.
    """
    config = study.config
    probe: InstitutionProbe = config.probes[name]
    cases = [study.cases(ref) for ref in probe.sets]
    group = np.repeat(np.arange(len(cases)), [len(each) for each in cases])
    # Two sources may call different patients the same; two sets of one source may share some.
    sources = [config.sets[set_ref(ref).name].from_ for ref in probe.sets]
    patients = [f"{source} {row['patient']}" for source, each in zip(sources, cases, strict=True) for row in each.rows]
    fits = {"folds": probe.folds, "seed": config.seed}

    def told(score: ProbeScore, **what: Any) -> Row:
        accuracy, auroc = score.accuracy._asdict(), score.auroc._asdict()
        return {**what, "accuracy": accuracy, "auroc": auroc, "majority": score.majority}

    labels = [label for label in cases[0].labels if all(label in each.labels for each in cases)]
    rows = [row for each in cases for row in each.rows]
    truth = np.array([[float(label in row["labels"]) for label in labels] for row in rows]).reshape(len(rows), -1)
    found = []
    if labels:
        score = linear_probe(truth, group, patients, draws=probe.draws, **fits)
        found.append(told(score, stage=None, features="labels", control="labels"))
    bases: set[str] = set()
    for stage in probe.stages:
        base = config.base_of(stage_ref(stage).name)
        measured = [row for ref in probe.sets for row in _measured(study, name, stage, ref)]
        kinds = ["prompt"] if base in bases else ["tower", "prompt"]
        bases.add(base)
        for kind in kinds:
            values = np.array([row[kind] for row in measured])
            what = {"stage": base if kind == "tower" else stage, "features": kind}
            score = linear_probe(values, group, patients, draws=probe.draws, **fits)
            nothing = chance(values, group, patients, shuffles=probe.shuffles, **fits)
            found += [told(score, **what, control=None), told(nothing, **what, control="shuffled")]
    return found


def _measured(study: Opened, name: str, stage: str, ref: str) -> Sequence[Row]:
    return read_rows(study.config.run / "measured" / name / folder_of(stage, ref) / ROWS)


def _written(numbers: np.ndarray) -> list[float]:
    return [float(f"{number:.{DIGITS}g}") for number in numbers.tolist()]
