"""The artefacts of a run, one after the other: what is there, due, or another start's, and the making of what is due.

Process 0 decides from the run folder, and tells the others, who never look at the folder for it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

from vlmalign import stopping
from vlmalign.distributed import is_writer
from vlmalign.exchange import from_first
from vlmalign.log import stage_timer
from vlmalign.machine import environment_record
from vlmalign.progress import Progress
from vlmalign.reporting.html import write_report
from vlmalign.studies.engine.base import Base, open_base
from vlmalign.studies.engine.devices import Devices
from vlmalign.studies.engine.folder import told
from vlmalign.studies.engine.graph import REPORT, Edge, Node
from vlmalign.studies.engine.identity import BEFORE, content_ids, is_given, record_of
from vlmalign.studies.engine.make import Making, make_answers, make_scores, make_set, make_source, make_stage
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.overlaps import check_overlaps
from vlmalign.studies.engine.owner import SILENT_SECONDS, TOUCH_SECONDS, Held, Owners
from vlmalign.studies.engine.probe import make_measured, make_probe
from vlmalign.studies.engine.readers import write_readers
from vlmalign.studies.engine.record import CONTINUED, Record, damage, differences, read_record, refuse_unrecorded
from vlmalign.studies.engine.sets import check_images
from vlmalign.studies.engine.stage_config import ModelStage

#: seconds after which a lock of another machine is looked at again: it would have been touched
LOOK_AGAIN = 1.5 * TOUCH_SECONDS

#: kinds that follow from others at once: they are made again rather than refused
DERIVED = ("scores", "probe", REPORT)


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
        return (earlier, whole) if whole or node.kind in CONTINUED else (None, False)

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
            elif node.kind == "measured":
                make_measured(making, base)
            elif node.kind == "scores":
                make_scores(making)
            elif node.kind == "probe":
                make_probe(making)
            elif node.kind == REPORT:
                from_first(self._write_report)
            else:
                if node.key not in study.texts:
                    study.open_stage(node.key, progress.say)
                make_stage(making, base, last_use=self._last_use(node))

    def _write_report(self) -> None:
        config = self.study.config
        readers = None if config.report.readers is None else config.place(config.report.readers)
        write_readers(config.run, readers, self.study.hashes)
        write_report(config.run)

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
