"""`vlmalign run`: makes of a study what is missing, continues what was begun, skips what is there, and refuses by name
what was made from something else.

Everything that can be known is checked before anything is made. Which artefacts are made is decided by process 0 from the
run folder, and told to the others, who never look at the folder for it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlmalign.config import dump_config
from vlmalign.distributed import is_writer
from vlmalign.exchange import agree, from_first
from vlmalign.log import stage_timer
from vlmalign.machine import environment_record, matmul_rate
from vlmalign.progress import Progress
from vlmalign.reporting.html import write_report
from vlmalign.studies.engine import make
from vlmalign.studies.engine.base import Base, base_devices, open_base
from vlmalign.studies.engine.config import StudyConfig
from vlmalign.studies.engine.devices import Devices
from vlmalign.studies.engine.files import Hashes, write_json, write_whole
from vlmalign.studies.engine.graph import REPORT, Edge, Node, ancestors, build_graph, descendants, find_nodes
from vlmalign.studies.engine.identity import BEFORE, content_ids, is_given, record_of
from vlmalign.studies.engine.opened import Opened, check_labels
from vlmalign.studies.engine.overlaps import check_overlaps
from vlmalign.studies.engine.record import BEGUN, Record, differences, read_record
from vlmalign.studies.engine.rewards import refuse_received
from vlmalign.studies.engine.stage_config import ModelStage, Policy
from vlmalign.studies.engine.summary import print_summary

STUDY, HASHES, SET_ASIDE = "study.yaml", ".hashes.json", "set-aside"

#: kinds that follow from others at once: they are made again rather than refused
DERIVED = ("scores", REPORT)


@dataclass(frozen=True)
class Asked:
    """What of a study is asked for."""

    only: Sequence[str] = ()  #: names of artefacts; they and what they are made from. None: all
    redo: Sequence[str] = ()  #: names of artefacts that are set aside first, with all that was made from them
    dry: bool = False  #: say what would be done, and do nothing
    hours: Mapping[str, float] = field(default_factory=dict)  #: stage -> what a plan says that it takes, for a dry run


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
    """
    refuse_received(config, source)
    agree(dump_config(config), "the config")
    nodes = build_graph(config)
    wanted = (
        ancestors(nodes, [name for text in asked.only for name in find_nodes(nodes, text)])
        if asked.only
        else set(nodes)
    )
    from_first(lambda: check_folder(config, nodes))
    study = Opened(settle(config), Hashes(config.run / HASHES), config)
    agree(dump_config(study.config), "what was chosen for the devices")
    with Progress(quiet=not is_writer()) as progress:
        progress.say(f"run folder {config.run}")
        devices = {name: _devices(study, name) for name in _bases(config, nodes, wanted)}
        set_aside = [
            name for text in asked.redo for found in find_nodes(nodes, text) for name in descendants(nodes, found)
        ]
        _open_files(study, nodes, wanted, progress)
        if not asked.dry:
            from_first(lambda: _set_aside(config.run, dict.fromkeys(set_aside)))
        steps = Steps(
            study, nodes, wanted, devices, progress, asked.dry, frozenset(set_aside) if asked.dry else frozenset()
        )
        steps.refuse_changed()
        if asked.dry:
            steps.tell(asked.hours)
            return config.run
        from_first(lambda: _begin(config))
        steps.make_all()
        from_first(study.hashes.save)
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
    dry: bool
    gone: frozenset[str]  #: nodes that a dry run takes as set aside

    def __post_init__(self) -> None:
        self.ids: dict[Edge, str] = {}  # of what is there or has been made
        self.record: Record | None = None  # of the node that is being made, in process 0
        self.versions = environment_record()["packages"]

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
            return []
        state = "was made" if whole else "is under way"
        return [
            f"{self.study.config.run / node.name} {state} from something else: {'; '.join(found)}. Restore that to go on "
            f"with it, make it and all that follows from it again with --redo {node.name}, or choose another run folder"
        ]

    def _earlier(self, node: Node) -> tuple[dict[str, Any] | None, bool]:
        return (None, False) if node.name in self.gone else read_record(node.folder(self.study.config.run))

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

    def make_all(self) -> None:
        """Make what is missing, in order; each base is loaded for as long as it is needed."""
        loaded: tuple[str, Base] | None = None
        compared = False
        try:
            for node in self._in_order():
                if node.base is not None and not compared:  # sets are all there
                    from_first(self._compare_sets)
                    compared = True
                if not self._is_due(node):
                    continue
                if node.base is not None:
                    key = self.base_key(node.base)
                    if loaded is None or loaded[0] != key:
                        if loaded is not None:
                            self._close(loaded[1])
                        loaded = (key, self._load(node.base))
                with self.timed(node.name):
                    self._make(node, None if loaded is None else loaded[1])
                self._learn_ids(node)
        finally:
            if loaded is not None:
                self._close(loaded[1])

    def _compare_sets(self) -> None:
        """Raises ValueError for a set that is learnt from and overlaps one that is measured on, where anything is due."""
        due = [node for node in self._in_order() if node.base is not None and not is_given(node)]
        if not all(self._earlier(node)[1] for node in due):
            check_overlaps(self.study, [node.key for node in due if node.name.startswith("stages/")])

    def base_key(self, stage: str) -> str:
        """Stages of kind model that name the same folder in the same way are one base."""
        section: ModelStage = self.study.config.stages[stage]
        return f"{section.path} {section.dtype} {section.attention} {section.remat}"

    def _is_due(self, node: Node) -> bool:
        """Whether a node is to be made; process 0 decides, and keeps its record."""
        if is_given(node) or not from_first(lambda: self._decide(node)):
            self._learn_ids(node)
            return False
        return True

    def _decide(self, node: Node) -> bool:
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

    def _load(self, stage: str) -> Base:
        with self.timed("load model"):
            return open_base(self.study.front(stage), self.devices[stage], self.study.config.reading, self.progress)

    def _close(self, base: Base) -> None:
        with closing(base):
            if base.reader is not None:
                self.progress.say(f"images: {base.reader.statistics()}")

    def _make(self, node: Node, base: Base | None) -> None:
        study, progress, versions, record = self.study, self.progress, self.versions, self.record
        if node.kind == "source":
            make.make_source(study, node, record, versions)
        elif node.kind == "set":
            make.make_set(study, node, record, versions, progress)
        elif node.kind == "answers":
            make.make_answers(study, node, record, base, versions, progress)
        elif node.kind == "scores":
            make.make_scores(study, node, record, versions)
        elif node.kind == REPORT:
            from_first(lambda: str(write_report(study.config.run)))
        else:
            if node.key not in study.texts:
                study.open_stage(node.key, progress.say)
            make.make_stage(study, node, record, base, versions, progress, last_use=self._last_use(node))

    def _last_use(self, node: Node) -> bool:
        """Whether nothing after this stage needs its base without an adapter."""
        names = list(self.nodes)
        later = [self.nodes[name] for name in names[names.index(node.name) + 1 :] if name in self.wanted]
        key = self.base_key(node.base)
        rest = [each for each in later if each.base is not None and self.base_key(each.base) == key]
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


def check_folder(config: StudyConfig, nodes: Mapping[str, Node]) -> None:
    """Raises ValueError when the run folder holds an earlier layout, or nothing but artefacts of another study."""
    if (config.run / "config.yaml").exists() and not (config.run / STUDY).exists():
        raise ValueError(
            f"{config.run} holds a run of vlmalign 0.1 (config.yaml), which only that version can continue; `vlmalign "
            "report` and `vlmalign export` read it. Choose another run folder"
        )
    there = {
        path.parent.relative_to(config.run).as_posix()
        for name in (BEGUN, "made.json")
        for path in config.run.glob(f"s*/*/{name}")
    }
    if there and not there & set(nodes):
        raise ValueError(
            f"{config.run} holds another study: {', '.join(sorted(there)[:3])}, and nothing of this one; choose another run "
            "folder"
        )


def _begin(config: StudyConfig) -> None:
    """Write the study's config, and once the machine's record."""
    config.run.mkdir(parents=True, exist_ok=True)
    if not (config.run / "environment.json").exists():
        write_json(config.run / "environment.json", {**environment_record(), "matmul_gflops": matmul_rate()})
    write_whole(config.run / STUDY, dump_config(config))


def _set_aside(run: Path, names: Mapping[str, None]) -> None:
    """Move artefacts into `set-aside/N/`, where they are kept and never looked at."""
    there = [name for name in names if (run / name).is_dir()]
    if not there:
        return
    number = 1 + sum(1 for _ in (run / SET_ASIDE).glob("*")) if (run / SET_ASIDE).is_dir() else 1
    for name in there:
        target = run / SET_ASIDE / str(number) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(run / name, target)
