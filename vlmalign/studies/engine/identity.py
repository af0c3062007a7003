"""The record of each artefact: every setting, parent and input that it follows from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from vlmalign.studies.engine.answers_config import Answers
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.files import digest_of
from vlmalign.studies.engine.graph import Edge, Node
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.probe_config import OcclusionProbe, OfAnswers
from vlmalign.studies.engine.record import Parent, Record, read_record
from vlmalign.studies.engine.sections import split_free
from vlmalign.studies.engine.set_config import Set
from vlmalign.studies.engine.stage_config import Stage

#: settings younger than a kind's first records: kind -> the values that they had when nobody could set them
BEFORE: Mapping[str, Mapping[str, Any]] = {
    "answers": {"probability": "samples"},
    "scores": {"subgroups": {}},
    "source": {"convention": None},
    "grpo": {"label_dropout": 0.0, "sft": None},
    "ppo": {"label_dropout": 0.0},
    "set": {
        "floors": {},
        "cap": None,
        "caps": {},
        "where": {},
        "hash": None,
        "pyramid": None,
        "source": {"labels": {"lists": False, "blank": "none"}},
    },
}

#: what of a section is said by parents or inputs, and may be called something else
NAMES = {"from", "reference", "apart", "role", "peek", "may_overlap"}


def record_of(study: Opened, node: Node, ids: Mapping[Edge, str]) -> Record:
    """The record of a node whose parents' contents are known: `ids` holds them."""
    config = study.config
    parents = {role: Parent(edge.node, ids[edge], edge.which) for role, edge in node.parents.items()}
    if node.kind == "source":
        binding, free = split_free(config.sources[node.key].phantom)
        return Record(node.name, node.kind, {"kind": config.sources[node.key].kind, **binding}, free)
    if node.kind == "set":
        section: Set = config.sets[node.key]
        source, free = split_free(config.sources[section.from_])
        settings = {**_own(section), "seed": config.seed if section.seed is None else section.seed, "source": source}
        paths = study.source(section.from_).files
        names = Counter(path.name for path in paths)  # shards in several folders may be called the same
        files = {
            f"source {path.name if names[path.name] == 1 else f'{path.parent.name}/{path.name}'}": study.hashes.of(path)
            for path in paths
        }
        return Record(node.name, node.kind, settings, free, parents, files)
    if node.kind == "answers":
        settings, free = _answered(study, config.answers[node.key], node.set)
        return Record(node.name, node.kind, settings, free, parents)
    if node.kind == "measured":
        probe = config.probes[node.key]
        asked = config.asked_by(probe)
        if isinstance(probe, OfAnswers):
            settings, free = _answered(study, asked, node.set)
        else:
            task = study.task(asked.task, Data(set=node.set))
            settings, free = {"seed": config.seed, "task": split_free(task)[0]}, split_free(probe)[1]
        boxes = {"boxes": study.hashes.of(config.place(probe.boxes))} if isinstance(probe, OcclusionProbe) else {}
        return Record(node.name, node.kind, {**settings, **probe.measured_with(node.variant)}, free, parents, boxes)
    if node.kind == "probe":
        binding, _ = split_free(config.probes[node.key])
        return Record(node.name, node.kind, {**binding, "seed": config.seed}, {}, parents)
    if node.kind == "scores":
        entry = config.answers[node.key]
        return Record(
            node.name,
            node.kind,
            {
                "draws": entry.draws,
                "subgroups": split_free(entry)[0]["subgroups"],
                "seed": config.seed,
                "task": split_free(study.task_of_answers(entry, entry.sets[0]))[0],
            },
            {},
            parents,
        )
    return _stage(study, node, parents)


def _answered(study: Opened, entry: Answers, ref: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the answers of an entry to a set follow from, and what is free."""
    binding, free = split_free(entry)
    settings = {k: v for k, v in binding.items() if k not in ("stages", "sets", "task", "draws", "subgroups")}
    task = study.task_of_answers(entry, ref)
    return {**settings, "seed": study.config.seed, "task": split_free(task)[0]}, free


def _stage(study: Opened, node: Node, parents: Mapping[str, Parent]) -> Record:
    config, stage = study.config, study.written.stages[node.key]
    binding, free = split_free(stage)
    settings = {key: value for key, value in binding.items() if key not in NAMES}
    if isinstance(stage, Stage):
        spec = study.spec(node.key)
        settings |= {
            "seed": config.seed_of(node.key),
            "depth": config.depth_of(node.key),
            "lora": None if spec is None else {**vars(spec), "targets": list(spec.targets)},
            "task": split_free(study.task_of_stage(node.key))[0],
        }
        free["mesh"] = None if config.mesh is None else config.mesh.model_dump()
        base = study.fronts[config.place(config.stages[node.base].path)]
        free["base"] = str(base.path)
    return Record(node.name, node.kind, settings, free, parents, study.inputs(node.key))


def content_ids(study: Opened, node: Node) -> dict[Edge, str]:
    """The ids by which others know a node: itself, and its states or parts. Empty where it has not been made.

    Models and adapters are folders of the user's own; they are known by their files and made by nobody.
    """
    if node.kind in ("model", "adapter"):
        (content,) = study.inputs(node.key).values()
        section = study.written.stages[node.key]
        # How a checkpoint is run is part of what it gives: its dtype.
        return {Edge(node.name): content if node.kind == "adapter" else digest_of([content, section.dtype])}
    made, whole = read_record(node.folder(study.config.run))
    if not whole:
        return {}
    return {Edge(node.name): made["id"], **{Edge(node.name, which): found for which, found in made["content"].items()}}


def is_given(node: Node) -> bool:
    """Whether a node is there from the beginning: a checkpoint or an adapter of the user's."""
    return node.kind in ("model", "adapter")


def _own(section: Set) -> dict[str, Any]:
    binding, _ = split_free(section)
    return {key: value for key, value in binding.items() if key not in NAMES}
