"""The probe `occlusion`: does the model look where a finding is? Maps of what covering a part of the film does to the
log-probability of the finding's name, against boxes drawn by readers (evaluation/localisation).

A patch of mean grey slides over the film. For each place, film and question are computed once, and the names of all the
film's boxed labels are scored as continuations of them: each as the answer that consists of it alone, after an empty
reasoning, of which the tokens count that tell the names of the task apart.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from vlmalign.data.films.altered import Alteration, AlteredFilms, cover
from vlmalign.data.sources.nih_boxes import read_boxes
from vlmalign.data.sources.schema import NIH14
from vlmalign.data.sources.settings import label_map_of
from vlmalign.distributed import own_share
from vlmalign.evaluation.bootstrap import bootstrap_ratio
from vlmalign.evaluation.localisation import Box, cell_map, centre_map, localise, random_map
from vlmalign.evaluation.scoring import score_groups
from vlmalign.exchange import gather_from
from vlmalign.studies.engine.base import Base
from vlmalign.studies.engine.config import set_ref, stage_ref
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.files import read_rows
from vlmalign.studies.engine.make import Making, state_of
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.probe_config import ROWS, OcclusionProbe, folder_of
from vlmalign.studies.engine.score import steps_of
from vlmalign.tasks.labels import LabelsTask, answer_text
from vlmalign.training.rollouts import Task as Question
from vlmalign.types import Example, Segment

Row = dict[str, Any]

#: of the fall of a log-probability: what lies below is rounding, of which a map would be made up where nothing falls
DECIMALS = 4
#: all labels of a set together
ALL = "all"


def boxes_of(study: Opened, name: str, ref: str) -> dict[str, dict[str, list[Box]]]:
    """Case -> label, as the set's labels are told -> its boxes.

    Raises:
        ValueError: when no film of the set has a box of a label that is told there.
    """
    config = study.config
    probe: OcclusionProbe = config.probes[name]
    source, cases = config.sources[config.sets[set_ref(ref).name].from_], study.cases(ref)
    table = None if source.label_map is None else label_map_of(source.label_map, NIH14)
    ids = {row["id"] for row in cases.rows}
    found: dict[str, dict[str, list[Box]]] = defaultdict(lambda: defaultdict(list))
    for box in read_boxes(config.place(probe.boxes)):
        for label in (box.label,) if table is None else table.images(box.label):
            if box.id in ids and label in cases.labels:
                found[box.id][label].append(Box(*box[2:]))
    if not found:
        raise ValueError(
            f"probes.{name}: no film of set {ref} has a box in {probe.boxes} of one of its labels ({', '.join(cases.labels)}); "
            "boxes are of films of NIH ChestX-ray14, by their image index"
        )
    return {id: dict(labels) for id, labels in found.items()}


def measure(making: Making, base: Base) -> list[Row]:
    """A row for each boxed label of each film: id, patient, label, boxes (left, top, width, height), `logp` of its name on
    the whole film, and `map`, how far it falls where each cell is covered."""
    study, node = making.study, making.node
    probe: OcclusionProbe = study.config.probes[node.key]
    boxes, data, stage = boxes_of(study, node.key, node.set), Data(set=node.set), stage_ref(node.stage).name
    task: LabelsTask = study.task(probe.task, data)
    numbered = [(number, case) for number, case in study.numbered(data) if case.id in boxes]
    found = study.questions(data, task, stage, iter(numbered))
    names = _names(study, stage, task, found.cases[0])
    where = base.devices.sampling()
    policy = base.policy(state_of(study, base, node.parents["stage"]), where, decodes=False)
    making.progress.stage(f"occlusion of {node.set}, {node.stage}", max(1, len(own_share(found.items))))
    advance = making.advance()

    def maps(case: Example, question: Question) -> list[np.ndarray]:
        """One film's maps, a label each, with the whole film's log-probability in front."""
        group = replace(question.prompt, continuations=tuple(names[label] for label in boxes[case.id]))
        alterations = patches(probe.cells, probe.patch)
        (path,) = group.images
        keys = {f"{path}\0{place}": (path, alter) for place, alter in enumerate([np.copy, *alterations])}
        features = base.features.reading(AlteredFilms(base.front.pixels, keys.__getitem__), capacity_bytes=0)
        scores = score_groups(
            base.model(None), policy, [replace(group, images=(key,)) for key in keys], features=features,
            budget=probe.tokens, mesh=None if where is None else where.mesh,
        )  # fmt: skip
        logp = np.array(
            [
                [
                    each.logp[own.weight > 0].sum(dtype=np.float64)
                    for each, own in zip(row, group.continuations, strict=True)
                ]
                for row in scores
            ]
        )  # [1 + places, labels]
        side = probe.cells - probe.patch + 1
        drops = (logp[0] - logp[1:]).round(DECIMALS).reshape(side, side, -1)
        advance(1)
        return [
            np.concatenate([logp[:1, label], cell_map(drops[..., label], patch=probe.patch).ravel()])
            for label in range(logp.shape[1])
        ]

    def own() -> list[list[np.ndarray]]:
        return [maps(case, question) for case, question in own_share(list(zip(found.cases, found.items, strict=True)))]

    return [
        {
            "id": case.id,
            "patient": case.patient,
            "label": label,
            "boxes": [list(box) for box in boxes[case.id][label]],
            "logp": float(values[0]),
            "map": values[1:].reshape(probe.cells, probe.cells).tolist(),
        }
        for case, own_maps in zip(found.cases, gather_from(own), strict=True)
        for label, values in zip(boxes[case.id], own_maps, strict=True)
    ]


def patches(cells: int, patch: int) -> list[Alteration]:
    """What covers `patch` x `patch` of the film's `cells` x `cells` at each place, row by row."""
    places = range(cells - patch + 1)
    return [
        partial(
            cover, top=row / cells, left=column / cells, bottom=(row + patch) / cells, right=(column + patch) / cells
        )
        for row in places
        for column in places
    ]


def _names(study: Opened, stage: str, task: LabelsTask, case: Example) -> dict[str, Segment]:
    """Each label's answer, whose tokens have weight where it differs from the answers with other labels."""
    chat, asked = study.front(stage).chat, task.ask(case)
    answers = {}
    for label in task.names:
        text = answer_text(task.form, "", [label], task.separator)
        (answers[label],) = chat.example([*asked, {"role": "assistant", "content": text}]).continuations
    tokens = [answer.tokens.tolist() for answer in answers.values()]
    start, end = shared_ends(tokens)
    return {
        label: replace(answer, weight=_between(len(answer), start, end).astype(np.float32))
        for label, answer in answers.items()
    }


def shared_ends(texts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens all texts begin with, and how many all end with, of what is left of the shortest.

    >>> shared_ends([[7, 1, 9], [7, 1, 2, 9], [7, 3, 9]])
    (1, 1)
    """
    shortest = min(map(len, texts))
    start = next((i for i in range(shortest) if len({text[i] for text in texts}) > 1), shortest)
    rest = shortest - start
    end = next((i for i in range(rest) if len({text[-1 - i] for text in texts}) > 1), rest)
    return start, end


def _between(length: int, start: int, end: int) -> np.ndarray:
    place = np.arange(length)
    return (start <= place) & (place < length - end)


def results(study: Opened, name: str) -> list[Row]:
    """For each set, state and label (and all of them) the pointing game and the IoU with their intervals, those of the
    controls, and the differences from the centre of the film and from the state before."""
    config = study.config
    probe: OcclusionProbe = config.probes[name]
    before = {second: first for first, second in steps_of(config, probe.stages)}
    controls = {"centre": centre_map(probe.cells), "random": random_map(probe.cells)}
    found = []
    for ref in probe.sets:
        rows = {
            stage: read_rows(config.run / "measured" / name / folder_of(stage, ref) / ROWS) for stage in probe.stages
        }
        maps: dict[str, list[Any]] = {
            stage: [(np.array(row["map"]), row) for row in own] for stage, own in rows.items()
        }
        first = rows[probe.stages[0]]
        maps |= {control: [(values, row) for row in first] for control, values in controls.items()}
        scores = {
            system: np.array(
                [localise(values, [Box(*box) for box in row["boxes"]], top=probe.top) for values, row in own]
            )
            for system, own in maps.items()
        }  # [film and label, (hit, IoU)]
        told = np.array([row["label"] for row in first])
        patients = np.array([row["patient"] for row in first])
        for system in scores:
            other = {"from_centre": "centre", "from_before": before.get(system)} if system in rows else {}
            for label in (ALL, *dict.fromkeys(told.tolist())):
                of = told == label if label != ALL else np.ones(len(told), bool)
                entry = {
                    "dataset": ref,
                    "system": system,
                    "control": system in controls,
                    "label": label,
                    "before": before.get(system),
                }
                for place, measure in enumerate(("hit", "iou")):
                    entry[measure] = _mean(scores[system][of, place], patients[of], probe, config.seed)
                    for what, than in other.items():
                        if than is not None:
                            gap = scores[system][of, place] - scores[than][of, place]
                            entry[f"{measure}_{what}"] = _mean(gap, patients[of], probe, config.seed)
                found.append(entry)
    return found


def _mean(values: np.ndarray, patients: np.ndarray, probe: OcclusionProbe, seed: int) -> Mapping[str, Any]:
    ones = [1] * len(values)
    return bootstrap_ratio(values.tolist(), ones, patients.tolist(), draws=probe.draws, seed=seed)._asdict()
