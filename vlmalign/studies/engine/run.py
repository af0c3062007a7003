"""`vlmalign run`: makes of a study what is missing, continues what was begun, skips what is there, and refuses by name
what was made from something else.

Everything that can be known is checked before anything is made; `steps` then makes what is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from vlmalign.config import dump_config
from vlmalign.distributed import is_writer
from vlmalign.evaluation.human_readers import read_readings
from vlmalign.exchange import agree, from_first
from vlmalign.progress import Progress
from vlmalign.studies.engine.base import base_devices
from vlmalign.studies.engine.config import StudyConfig, stage_ref
from vlmalign.studies.engine.devices import Devices
from vlmalign.studies.engine.files import Hashes
from vlmalign.studies.engine.folder import (
    HASHES,
    begin_run,
    check_folder,
    first_start,
    is_writable,
    save_hashes,
    set_aside,
    written_for,
)
from vlmalign.studies.engine.graph import Edge, Node, ancestors, build_graph, descendants, find_nodes
from vlmalign.studies.engine.opened import Opened, check_boxes, check_labels, check_subgroups
from vlmalign.studies.engine.owner import Owners
from vlmalign.studies.engine.rewards import refuse_received
from vlmalign.studies.engine.stage_config import ModelStage, Policy
from vlmalign.studies.engine.steps import Steps
from vlmalign.studies.engine.summary import print_summary


@dataclass(frozen=True)
class Asked:
    """What of a study is asked for."""

    only: Sequence[str] = ()  #: names of artefacts; they and what they are made from. None: all
    redo: Sequence[str] = ()  #: names of artefacts that are set aside first, with all that was made from them
    dry: bool = False  #: say what would be done, and do nothing
    hours: Mapping[str, float] = field(default_factory=dict)  #: stage -> what a plan says that it takes, for a dry run
    trust_code: bool = False  #: run rewards' code also from a run folder or a checkpoint
    take_over: bool = False  #: what others are at work on is this run's: they have ended, and nobody can see it


def run(
    config: StudyConfig,
    source: Path,
    asked: Asked = Asked(),
    *,
    settle: Callable[[StudyConfig], StudyConfig] = lambda config: config,
) -> Path:
    """Make the study's artefacts; returns its run folder.

    `source` is the file that the config was read from, as the user named it. `settle` chooses what the config leaves open
    ("auto") for the devices here; records keep the config's own words.

    Raises:
        ValueError: for anything that is not as it should be: folder, config, models, data, rewards; and naming an
            artefact that was made from something else, with what differs. Before any work starts where it can be known.
            When all else is made, for what others are at work on.
    """
    if not asked.trust_code:
        refuse_received(config, source)
    agree(dump_config(config), "the config")
    nodes = build_graph(config)
    wanted = (
        ancestors(nodes, [name for text in asked.only for name in find_nodes(nodes, text)])
        if asked.only
        else set(nodes)
    )
    from_first(lambda: check_folder(config, nodes))
    started = datetime.fromisoformat(from_first(lambda: first_start(config).isoformat()))
    study = Opened(settle(config), Hashes(config.run / HASHES), config, started, asked.trust_code)
    agree(dump_config(study.config), "what was chosen for the devices")
    with (
        written_for(config),
        Progress(quiet=not is_writer()) as progress,
        Owners(config.run, take_over=asked.take_over) as owners,
    ):
        progress.say(f"run folder {config.run}")
        devices = {name: _devices(study, name) for name in _bases(config, nodes, wanted)}
        redone = dict.fromkeys(
            name for text in asked.redo for found in find_nodes(nodes, text) for name in descendants(nodes, found)
        )
        _open_files(study, nodes, wanted, progress)
        if not asked.dry:
            from_first(lambda: set_aside(config, redone, owners))
        gone = frozenset(redone if asked.dry else ())
        steps = Steps(study, nodes, wanted, devices, progress, owners, gone)
        steps.refuse_changed()
        if asked.dry:
            steps.tell(asked.hours)
            return config.run
        if from_first(lambda: is_writable(config)):
            from_first(lambda: begin_run(config, owners, started))
            steps.make_all()
            from_first(lambda: save_hashes(study.hashes, owners))
        elif from_first(steps.all_there):
            progress.say(f"{config.run} cannot be written to; all of the study is there")
        else:
            raise ValueError(
                f"{config.run} cannot be written to, and not all of the study is there; make it writable, or give --run "
                "another folder"
            )
    if is_writer():
        print_summary(config, nodes)
    return config.run


def _bases(config: StudyConfig, nodes: Mapping[str, Node], wanted: set[str]) -> list[str]:
    """The stages of kind model whose weights something wanted needs."""
    return list(dict.fromkeys(node.base for node in nodes.values() if node.base is not None and node.name in wanted))


def _devices(study: Opened, base: str) -> Devices:
    """Where a base will live; no weights are read.

    Raises:
        ValueError: when the mesh does not fit the devices or the model; naming the setting, when rows do not share out.
    """
    config = study.config
    section: ModelStage = config.stages[base]
    trained = {name: stage for name, stage in config.trained.items() if config.base_of(name) == base}
    whole = any(study.spec(name) is None for name in trained)
    devices = base_devices(section, study.front(base), config.mesh, whole=whole)
    if devices.mesh is not None:
        for name, entry in config.answers.items():
            if entry.probability == "first-token" and any(
                config.base_of(stage_ref(ref).name) == base for ref in entry.stages
            ):
                raise ValueError(
                    f"answers.{name}.probability: first-token is computed on one device, found {devices.mesh.size}; use the "
                    "share of the samples, or start the run on one"
                )
    for name, stage in trained.items():
        devices.require_rows(stage.shapes.rows, f"stages.{name}.shapes.rows")
        if isinstance(stage, Policy):
            devices.require_rows(stage.rollout.rows, f"stages.{name}.rollout.rows", tensor=stage.rollout.tensor)
    return devices


def _open_files(study: Opened, nodes: Mapping[str, Node], wanted: set[str], progress: Progress) -> None:
    """Read what stages and sets name before anything is made: files of rows at once, sources that are there already."""
    config = study.config
    study.adapters  # noqa: B018  (opens and checks them)
    for name, section in config.sources.items():
        needed = any(nodes[each].kind == "set" and config.sets[nodes[each].key].from_ == name for each in wanted)
        invented = any(edge.node.startswith("sources/") for edge in _set_parents(nodes, config, name))
        root = config.place(getattr(section, "root", ""))
        if needed and (not invented or from_first(root.exists)):
            study.source(name)
    if config.report.readers is not None:
        read_readings(config.place(config.report.readers))  # what is wrong with them is said before hours of work
    check_labels(config, study.sources)
    check_subgroups(config, study.sources)
    check_boxes(config, study.sources)
    for name, stage in config.trained.items():
        if f"stages/{name}" in wanted and isinstance(stage, Policy):
            study.build_rewards(name)
    for name, stage in config.trained.items():
        if f"stages/{name}" in wanted and not any(data.sets for data in stage.reads.values()):
            study.open_stage(name, progress.say)
    # Other rows would make other batches: processes would compute different things, or wait for each other for ever.
    agree([study.inputs(name) for name in study.texts], "the rows that they read")


def _set_parents(nodes: Mapping[str, Node], config: StudyConfig, source: str) -> Iterator[Edge]:
    """What the sets of a source are made from."""
    for node in nodes.values():
        if node.kind == "set" and config.sets[node.key].from_ == source:
            yield from node.parents.values()
