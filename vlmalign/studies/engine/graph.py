"""The artefacts of a study and what each is made from, in the order in which they are made.

Sets come first, since they need no device; then base by base its stages and their answers, so that each base is loaded
once; then scores and the report.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from vlmalign.config_tree import nearest
from vlmalign.studies.engine.config import StudyConfig, set_ref, stage_ref
from vlmalign.studies.engine.probe_config import AnyProbe, OfAnswers, PairsProbe, folder_of
from vlmalign.studies.engine.stage_config import ModelStage, Stage

REPORT = "report"


class Edge(NamedTuple):
    """What a node is made from: another node, or a state or part of it."""

    node: str
    which: str | None = None


@dataclass(frozen=True)
class Node:
    """One artefact: a folder of the run, there whole or not at all."""

    name: str  #: its folder below the run's: "stages/sft"
    kind: str  #: "source", "set", a kind of stage, "answers", "scores", "measured", "probe" or "report"
    key: str  #: its name in the config's section
    parents: Mapping[str, Edge] = field(default_factory=dict)  #: role -> what it is made from
    base: str | None = None  #: the stage of kind model whose weights it needs
    stage: str | None = None  #: of answers and measurements: the state that answers
    set: str | None = None  #: of answers and measurements: the set that is answered
    variant: str | None = None  #: of measurements: how films are altered

    def folder(self, run: Path) -> Path:
        return run / self.name


def build_graph(config: StudyConfig) -> dict[str, Node]:
    """Every node by its name, parents first."""
    nodes: dict[str, Node] = {}

    def add(node: Node) -> None:
        nodes[node.name] = node

    invented: dict[str, str] = {}  # root -> the source that is invented there; others may read other splits of it
    for name, source in config.sources.items():
        if getattr(source, "phantom", None) is not None:
            add(Node(f"sources/{name}", "source", name))
            invented[str(config.place(source.root))] = f"sources/{name}"
    for name in _sets_in_order(config):
        section = config.sets[name]
        parents = {"apart " + ref: Edge(f"sets/{set_ref(ref).name}", set_ref(ref).which) for ref in section.apart}
        root = str(config.place(getattr(config.sources[section.from_], "root", "")))
        if root in invented:
            parents["from"] = Edge(invented[root])
        add(Node(f"sets/{name}", "set", name, parents))
    order = config.in_order()
    for base in [name for name, stage in order.items() if isinstance(stage, ModelStage)]:
        own = [name for name in order if config.base_of(name) == base]
        for name in own:
            add(Node(f"stages/{name}", order[name].kind, name, _parents_of_stage(config, name), base))
        for entry, answers in config.answers.items():
            for ref in answers.stages:
                if stage_ref(ref).name in own:
                    for each in answers.sets:
                        parents = {"stage": _state(config, ref), "set": _part(each)}
                        add(Node(f"answers/{entry}/{ref}/{each}", "answers", entry, parents, base, ref, each))
        for probe, section in config.probes.items():
            asked = config.asked_by(section)
            for ref, each, variant in product(asked.stages, asked.sets, section.variants()):
                if stage_ref(ref).name in own:
                    parents = {"stage": _state(config, ref), "set": _part(each)}
                    name = f"measured/{probe}/{folder_of(ref, each, variant)}"
                    add(Node(name, "measured", probe, parents, base, ref, each, variant))
    for entry, answers in config.answers.items():
        if config.is_scored(answers):
            parents = {
                f"{ref} {each}": Edge(f"answers/{entry}/{ref}/{each}")
                for ref in answers.stages
                for each in answers.sets
            }
            add(Node(f"scores/{entry}", "scores", entry, parents))
    for probe, section in config.probes.items():
        add(Node(f"probes/{probe}", "probe", probe, _parents_of_probe(config, probe, section)))
    add(Node(REPORT, REPORT, REPORT, {name: Edge(name) for name in nodes}))
    return nodes


def _sets_in_order(config: StudyConfig) -> Sequence[str]:
    found: dict[str, None] = {}

    def add(name: str) -> None:
        for ref in config.sets[name].apart:
            add(set_ref(ref).name)
        found.setdefault(name)

    for name in config.sets:
        add(name)
    return list(found)


def _parents_of_stage(config: StudyConfig, name: str) -> dict[str, Edge]:
    stage = config.stages[name]
    if isinstance(stage, ModelStage):
        return {}
    parents = {"from": _state(config, stage.from_)}
    if isinstance(stage, Stage):
        if getattr(stage, "reference", None) is not None:
            parents["reference"] = _state(config, stage.reference)
        for place, data in stage.reads.items():
            role = place.removesuffix(".data")
            for ref in data.sets:
                parents[role if len(data.sets) == 1 else f"{role} {ref}"] = _part(ref)
        if stage.validation is not None:
            parents |= {f"watch {ref}": _part(ref) for ref in stage.validation.watch}
    return parents


def _parents_of_probe(config: StudyConfig, name: str, probe: AnyProbe) -> dict[str, Edge]:
    asked = config.asked_by(probe)
    measured = [folder_of(*each) for each in product(asked.stages, asked.sets, probe.variants())]
    parents = {f"measured {each}": Edge(f"measured/{name}/{each}") for each in measured}
    if isinstance(probe, OfAnswers):
        answers = [folder_of(*each) for each in product(asked.stages, asked.sets)]
        parents |= {f"answers {each}": Edge(f"answers/{probe.answers}/{each}") for each in answers}
    if isinstance(probe, PairsProbe):
        parents["training"] = _part(probe.training)
    return parents


def _state(config: StudyConfig, ref: str) -> Edge:
    name, which = stage_ref(ref)
    if not isinstance(config.stages[name], Stage):
        return Edge(f"stages/{name}")
    return Edge(f"stages/{name}", which or ("best" if config.has_best(name) else "last"))


def _part(ref: str) -> Edge:
    name, part = set_ref(ref)
    return Edge(f"sets/{name}", part)


def ancestors(nodes: Mapping[str, Node], wanted: Iterable[str]) -> set[str]:
    """These nodes, and all that they are made from."""
    found: set[str] = set()
    waiting = list(wanted)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += [edge.node for edge in nodes[name].parents.values()]
    return found


def descendants(nodes: Mapping[str, Node], name: str) -> list[str]:
    """This node, and all that is made from it, in order."""
    found = {name}
    for node in nodes.values():
        if any(edge.node in found for edge in node.parents.values()):
            found.add(node.name)
    return [each for each in nodes if each in found]


def find_nodes(nodes: Mapping[str, Node], text: str) -> list[str]:
    """The nodes that a user means: a whole name ("stages/sft"), a name in its section ("sft"), a folder ("answers"), or a
    stage of which there are siblings ("sft", which stands for sft-s0, sft-s1).

    Raises:
        ValueError: for a name that none has, with the nearest.
    """
    wanted = text.strip("/")
    found = [name for name in nodes if name == wanted or name.startswith(f"{wanted}/")]
    found = found or [node.name for node in nodes.values() if wanted in (node.key, node.name.partition("/")[2])]
    found = found or [node.name for node in nodes.values() if re.fullmatch(rf"{re.escape(wanted)}-s\d+", node.key)]
    if not found:
        near = nearest(wanted, [*nodes, *(node.key for node in nodes.values())])
        raise ValueError(f"this study has no artefact {text!r}; the nearest is {near!r} (vlmalign status lists them)")
    return found
