"""`vlmalign run`: makes of a study what is missing, continues what was begun, skips what is there, and refuses by name
what was made from something else.

Everything that can be known is checked before anything is made. Which artefacts are made is decided by process 0 from the
run folder, and told to the others, who never look at the folder for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vlmalign import stopping
from vlmalign.config import dump_config
from vlmalign.distributed import is_writer
from vlmalign.exchange import agree, from_first
from vlmalign.log import stage_timer
from vlmalign.machine import environment_record
from vlmalign.progress import Progress
from vlmalign.reporting.html import write_report
from vlmalign.studies.engine.base import Base, base_devices, open_base
from vlmalign.studies.engine.config import StudyConfig
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
    told,
    written_for,
)
from vlmalign.studies.engine.graph import REPORT, Edge, Node, ancestors, build_graph, descendants, find_nodes
from vlmalign.studies.engine.identity import BEFORE, content_ids, is_given, record_of
from vlmalign.studies.engine.make import Making, make_answers, make_scores, make_set, make_source, make_stage
from vlmalign.studies.engine.opened import Opened, check_labels
from vlmalign.studies.engine.overlaps import check_overlaps
from vlmalign.studies.engine.owner import SILENT_SECONDS, TOUCH_SECONDS, Held, Owners
from vlmalign.studies.engine.record import Record, damage, differences, read_record, refuse_unrecorded
from vlmalign.studies.engine.rewards import refuse_received
from vlmalign.studies.engine.sets import check_images
from vlmalign.studies.engine.stage_config import ModelStage, Policy
from vlmalign.studies.engine.summary import print_summary

#: seconds after which a lock of another machine is looked at again: it would have been touched
LOOK_AGAIN = 1.5 * TOUCH_SECONDS

#: kinds that follow from others at once: they are made again rather than refused
DERIVED = ("scores", REPORT)


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


@dataclass
class Steps:
    """The artefacts of a run, one after the other."""

    study: Opened
    nodes: Mapping[str, Node]
    wanted: set[str]
    devices: Mapping[str, Devices]
    progress: Progress
    owners: Owners
    gone: frozenset[str]  #: nodes that a dry run takes as set aside

    def __post_init__(self) -> None:
        self.ids: dict[Edge, str] = {}  # of what is there or has been made
        self.record: Record | None = None  # of the node that is being made, in process 0
        self.held: dict[str, Held] = {}  # what others are at work on, in process 0
        self.versions = environment_record()["packages"]
        self._loaded: tuple[str, Base] | None = None
        self._made: set[str] = set()  # by this start
        self._checked = self._waited = False

    def refuse_changed(self) -> None:
        """Raises ValueError, naming every artefact that was made from something else, as far as it can be known yet."""
        problems = from_first(self._changed)
        if problems:
            raise ValueError("\n".join(problems))

    def _changed(self) -> list[str]:
        problems: list[str] = []
        ids: dict[Edge, str] = {}
        for node in self._in_order():
            if is_given(node):
                ids |= content_ids(self.study, node)
                continue
            earlier, whole = self._earlier(node)
            if earlier is None or node.kind in DERIVED:
                continue
            known = {edge: ids.get(edge) for edge in node.parents.values()}
            if None not in known.values():
                problems += self._problem(node, record_of(self.study, node, known), earlier, whole)
            if whole:
                ids |= content_ids(self.study, node)
        return problems

    def _problem(self, node: Node, record: Record, earlier: Mapping[str, Any], whole: bool) -> list[str]:
        found = differences(record, earlier, under_way=not whole, before=BEFORE.get(node.kind, {}))
        if not found:
            damaged = damage(node.folder(self.study.config.run), earlier, self.study.hashes) if whole else None
            if damaged is None:
                return []
            return [
                f"{damaged}. Restore it, or make {node.name} and all that follows from it again with --redo {node.name}"
            ]
        state = "was made" if whole else "is under way"
        return [
            f"{self.study.config.run / node.name} {state} from something else: {'; '.join(found)}. Restore that to go on "
            f"with it, make it and all that follows from it again with --redo {node.name}, or choose another run folder"
        ]

    def _earlier(self, node: Node) -> tuple[dict[str, Any] | None, bool]:
        if node.name in self.gone:
            return None, False
        folder = node.folder(self.study.config.run)
        earlier, whole = read_record(folder)
        if earlier is None and node.kind not in ("source", REPORT):  # a source's folder may hold the user's own data
            earlier, whole = read_record(folder)  # another start may have ended it between the first look and this
            if earlier is None:
                refuse_unrecorded(folder)
        return earlier, whole

    def _in_order(self) -> Iterator[Node]:
        return (node for node in self.nodes.values() if node.name in self.wanted)

    def tell(self, hours: Mapping[str, float]) -> None:
        """Say what would be done, and how long stages take where a plan says it."""
        whole = {}
        for node in self._in_order():
            if is_given(node):
                continue
            earlier, done = self._earlier(node)
            if node.kind == REPORT:
                earlier, done = None, all(whole.values()) and (self.study.config.run / "report.html").exists()
            whole[node.name] = done
            planned = f"  {hours[node.key]:.2g} h" if node.name == f"stages/{node.key}" and node.key in hours else ""
            self.progress.say(f"{'there' if done else 'to continue' if earlier else 'to make':12} {node.name}{planned}")

    def all_there(self) -> bool:
        """Whether nothing is left to be made, but for the report."""
        return all(self._earlier(node)[1] for node in self._in_order() if not is_given(node) and node.kind != REPORT)

    def make_all(self) -> None:
        """Make what is missing, in order; each base is loaded for as long as it is needed. What others are at work on, and
        what is made from it, is left, and looked at again when everything else is there.

        Raises:
            ValueError: when nothing is left but what others are at work on.
        """
        waiting = list(self._in_order())
        try:
            while waiting:
                left = [node for node in waiting if not self._settle(node)]
                if len(left) == len(waiting):
                    self._unload()
                    from_first(self._wait_for_others)
                waiting = left
        finally:
            self._unload()

    def _settle(self, node: Node) -> bool:
        """Make a node where it is due; False where it, or what it is made from, is still another's."""
        if any(Edge(edge.node) not in self.ids for edge in node.parents.values()):
            return False
        if node.base is not None and not is_given(node) and not self._checked:
            if any(each.kind == "set" and Edge(each.name) not in self.ids for each in self._in_order()):
                return False
            from_first(self._check_sets)
            self._checked = True
        decided = "there" if is_given(node) else from_first(lambda: self._decide(node))
        if decided == "held":
            return False
        if decided == "due":
            if stopping.requested():
                raise stopping.Stopped(
                    f"{node.name} was not begun" if self._earlier(node)[0] is None else f"{node.name} is begun"
                )
            try:
                self._make(node)
                self._made.add(node.name)
            finally:
                if is_writer():
                    self.owners.release(node.name)
        self._learn_ids(node)
        return True

    def _wait_for_others(self) -> None:
        """Wait where others may have ended on machines that cannot be seen from here, until it is known."""
        held = self.held
        unknown = [each for each in held.values() if not each.here and not (self._waited and each.silent < LOOK_AGAIN)]
        if not unknown:
            raise ValueError(
                f"others are at work on all that is left: {told(held)}. Give the command again when they have ended; "
                "--take-over makes what they have this run's, for where they have ended and it cannot be seen from here"
            )
        if not self._waited:
            self.progress.say(
                f"waiting, at most {SILENT_SECONDS:.0f} s, to see whether they are still there: {told(held)}"
            )
        self._waited = True
        stopping.check("nothing was left but what others are at work on")
        time.sleep(LOOK_AGAIN)

    def _check_sets(self) -> None:
        """Raises ValueError, where anything is due, for a set with films that are others than those it was drawn with, and
        for one that is learnt from and overlaps one that is measured on."""
        due = [node for node in self._in_order() if node.base is not None and not is_given(node)]
        if all(self._earlier(node)[1] for node in due):
            return
        for node in self._in_order():
            if node.kind == "set" and node.name not in self._made:
                for part in list(self.study.config.sets[node.key].parts) or [None]:
                    ref = node.key if part is None else f"{node.key}.{part}"
                    check_images(self.study.cases(ref), self.study.hashes, self.progress)
        check_overlaps(self.study, [node.key for node in due if node.name.startswith("stages/")])

    def base_key(self, stage: str) -> str:
        """Stages of kind model that name the same folder in the same way are one base."""
        section: ModelStage = self.study.config.stages[stage]
        return f"{section.path} {section.dtype} {section.attention} {section.remat}"

    def _decide(self, node: Node) -> str:
        """Whether a node is there, held by another, or due; then it is this run's, and `record` is its own."""
        self.held.pop(node.name, None)
        if not self._is_due(node):
            return "there"
        holder = self.owners.claim(node.name)
        if holder is not None:
            self.held[node.name] = holder
            return "held"
        if self._is_due(node):
            return "due"
        self.owners.release(node.name)  # somebody has made it in between
        return "there"

    def _is_due(self, node: Node) -> bool:
        if node.kind == REPORT:
            return True
        self.record = record_of(self.study, node, self._parent_ids(node))
        earlier, whole = self._earlier(node)
        if earlier is None:
            return True
        problems = self._problem(node, self.record, earlier, whole)
        if problems and node.kind not in DERIVED:
            raise ValueError(problems[0])
        return not whole or bool(problems)

    def _parent_ids(self, node: Node) -> dict[Edge, str]:
        return {edge: self.ids[edge] for edge in node.parents.values()}

    def _learn_ids(self, node: Node) -> None:
        found = from_first(lambda: [[e.node, e.which, id] for e, id in content_ids(self.study, node).items()])
        self.ids |= {Edge(name, which): id for name, which, id in found}

    def _base_of(self, node: Node) -> Base:
        """The base that a node needs, loaded; another one is given up first."""
        key = self.base_key(node.base)
        if self._loaded is None or self._loaded[0] != key:
            self._unload()
            with self.timed("load model"):
                study, devices = self.study, self.devices[node.base]
                base = open_base(study.front(node.base), devices, study.config.reading, self.progress)
            self._loaded = (key, base)
        return self._loaded[1]

    def _unload(self) -> None:
        if self._loaded is None:
            return
        base, self._loaded = self._loaded[1], None
        with closing(base):
            if base.reader is not None:
                self.progress.say(f"images: {base.reader.statistics()}")

    def _make(self, node: Node) -> None:
        study, progress = self.study, self.progress
        base = None if node.base is None else self._base_of(node)
        making = Making(node, study, self.record, self.versions, progress, lambda: self.owners.check(node.name))
        with self.timed(node.name):
            if node.kind == "source":
                make_source(making)
            elif node.kind == "set":
                make_set(making)
            elif node.kind == "answers":
                make_answers(making, base)
            elif node.kind == "scores":
                make_scores(making)
            elif node.kind == REPORT:
                from_first(lambda: str(write_report(study.config.run)))
            else:
                if node.key not in study.texts:
                    study.open_stage(node.key, progress.say)
                make_stage(making, base, last_use=self._last_use(node))

    def _last_use(self, node: Node) -> bool:
        """Whether nothing after this stage needs its base without an adapter."""
        key = self.base_key(node.base)
        rest = [
            each
            for each in self._in_order()
            if each is not node and not is_given(each) and each.base is not None and self.base_key(each.base) == key
        ]
        return from_first(lambda: all(self._earlier(each)[1] for each in rest))

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        with stage_timer(self.study.config.run / "timing.jsonl", name, writes=is_writer()):
            yield


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
    check_labels(config, study.sources)
    for name, stage in config.trained.items():
        if f"stages/{name}" in wanted and isinstance(stage, Policy):
            study.build_rewards(name)
    for name, stage in config.trained.items():
        if (
            f"stages/{name}" in wanted
            and stage.data.set is None
            and (stage.validation is None or stage.validation.data.set is None)
        ):
            study.open_stage(name, progress.say)
    # Other rows would make other batches: processes would compute different things, or wait for each other for ever.
    agree([study.inputs(name) for name in study.texts], "the rows that they read")


def _set_parents(nodes: Mapping[str, Node], config: StudyConfig, source: str) -> Iterator[Edge]:
    """What the sets of a source are made from."""
    for node in nodes.values():
        if node.kind == "set" and config.sets[node.key].from_ == source:
            yield from node.parents.values()
