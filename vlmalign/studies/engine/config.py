"""A study: sources, sets, tasks, stages and answers by name. What depends on more than one section is checked here.

sources  what lies on disk              sets     what is drawn from a source
tasks    what is asked, and how it is read
stages   models, adapters, and training that goes on `from` another stage
answers  answers of stages to sets, which are scored and reported
probes   what answers rest on
report   what the page of the run shows beside them
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from vlmalign.config import FREE, Config
from vlmalign.config_tree import nearest
from vlmalign.data.sources.formats import AnySource
from vlmalign.studies.engine.answers_config import Answers
from vlmalign.studies.engine.probe_config import AnyProbe, OfAnswers, OfStates, PairsProbe
from vlmalign.studies.engine.report_config import Report
from vlmalign.studies.engine.report_config import problems as report_problems
from vlmalign.studies.engine.reward_config import FileReward
from vlmalign.studies.engine.sections import Mesh, Reading
from vlmalign.studies.engine.set_config import Set
from vlmalign.studies.engine.stage_config import AdapterStage, AnyStage, ModelStage, Policy, Stage, Trains
from vlmalign.tasks.labels import LabelsTask
from vlmalign.tasks.prompts import slots
from vlmalign.tasks.tasks import AnyTask

#: names become folders
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


class Ref(NamedTuple):
    """A state of a stage, or a part of a set: `sft@last`, `train.rl`."""

    name: str
    which: str | None


def stage_ref(text: str) -> Ref:
    """
    >>> stage_ref("sft@last"), stage_ref("sft").which is None
    (Ref(name='sft', which='last'), True)
    """
    name, _, which = text.partition("@")
    return Ref(name, which or None)


def set_ref(text: str) -> Ref:
    """
    >>> set_ref("train.rl")
    Ref(name='train', which='rl')
    """
    name, _, which = text.partition(".")
    return Ref(name, which or None)


class StudyConfig(Config):
    """A study in one run folder: what it makes is a graph of artefacts (`graph`)."""

    run: Path
    seed: Annotated[int, Field(ge=0)] = 0
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = ()  #: of every stage that trains a sibling for each (`seeds`)
    readable_by: Literal["owner", "group"] = "owner"  #: who may read what the run writes
    mesh: Mesh | None = None  #: null: an adapter is trained on copies of its base, a whole decoder is cut over fsdp
    reading: Reading = Reading()  #: of images
    sources: dict[str, AnySource] = Field(default_factory=dict)
    sets: dict[str, Set] = Field(default_factory=dict)
    tasks: dict[str, AnyTask] = Field(default_factory=dict)
    stages: Annotated[dict[str, AnyStage], Field(min_length=1)]
    answers: dict[str, Answers] = Field(default_factory=dict)
    report: Annotated[Report, FREE] = Report()  #: what stands beside the study's own numbers
    probes: dict[str, AnyProbe] = Field(default_factory=dict)

    def place(self, path: str | Path) -> Path:
        """A path of the config with "{run}" filled in."""
        return Path(str(path).replace("{run}", str(self.run)))

    @property
    def trained(self) -> dict[str, Trains]:
        """The stages that train, by name, parents first."""
        return {name: stage for name, stage in self.in_order().items() if isinstance(stage, Stage)}

    @property
    def runs_files(self) -> bool:
        """Whether some reward is code of the user's own."""
        stages = [stage for stage in self.stages.values() if isinstance(stage, Policy)]
        return any(isinstance(reward, FileReward) for stage in stages for reward in stage.rewards.values())

    def in_order(self) -> dict[str, Any]:
        """The stages, each after those it needs, otherwise as written; stages of one base together."""
        found: dict[str, Any] = {}

        def add(name: str) -> None:
            if name not in found:
                for parent in self.parents(name):
                    add(parent)
                found[name] = self.stages[name]

        for base in [name for name, stage in self.stages.items() if isinstance(stage, ModelStage)]:
            for name in self.stages:
                if self.base_of(name) == base:
                    add(name)
        return found

    def parents(self, name: str) -> tuple[str, ...]:
        """The stages that a stage goes on from or compares with."""
        stage = self.stages[name]
        refs = [getattr(stage, "from_", None), getattr(stage, "reference", None)]
        return tuple(stage_ref(ref).name for ref in refs if ref is not None)

    def base_of(self, name: str) -> str:
        """The stage of kind model that a stage goes back to."""
        while not isinstance(self.stages[name], ModelStage):
            name = stage_ref(self.stages[name].from_).name
        return name

    def seed_of(self, name: str) -> int:
        """What a stage's draws follow from: its own seed, or the study's."""
        own = getattr(self.stages[name], "seed", None)
        return self.seed if own is None else own

    def depth_of(self, name: str) -> int:
        """How many stages of training lie before a stage."""
        depth = 0
        while not isinstance(self.stages[name], ModelStage):
            name = stage_ref(self.stages[name].from_).name
            depth += isinstance(self.stages[name], Stage)
        return depth

    def has_best(self, name: str) -> bool:
        """Whether a stage keeps the state of its best validation."""
        stage = self.stages[name]
        return isinstance(stage, Stage) and stage.validation is not None and stage.validation.best is not None

    def task_of(self, name: str | None) -> tuple[str, AnyTask] | None:
        """A task by name; None given: the study's only one; None where there is none."""
        if name is None:
            return next(iter(self.tasks.items())) if len(self.tasks) == 1 else None
        return name, self.tasks[name]

    def asked_by(self, probe: AnyProbe) -> Any:
        """The section that names the stages, sets and task of a probe: an answers entry, or the probe's own."""
        return self.answers[probe.answers] if isinstance(probe, OfAnswers) else probe

    def is_scored(self, entry: Answers) -> bool:
        """Whether answers get scores: one to each case, or several that are label lists, of which there is a vote."""
        task = self.task_of(entry.task)
        return entry.samples == 1 or (task is not None and isinstance(task[1], LabelsTask))

    @model_validator(mode="after")
    def _holds_together(self) -> StudyConfig:
        problems = [*self._names(), *self._unknown_stages()]
        problems = problems or [*self._cycles()]
        problems = problems or [*self._bases(), *self._references_to_sets()]
        problems = problems or [
            *(*self._needs_tasks(), *self._roles()),
            *report_problems(self.report, self.answers),
        ]
        problems = problems or [*self._probabilities(), *self._probes_of_labels()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _names(self) -> Iterable[str]:
        for section in ("sources", "sets", "tasks", "stages", "answers", "probes"):
            for name in getattr(self, section):
                if not NAME.fullmatch(name):
                    yield f"{section}: {name!r} cannot be a name: use letters, digits, - and _ (it becomes a folder)"
        for name, each in self.sets.items():
            yield from _unknown(f"sets.{name}.from", each.from_, self.sources, "source")
            for part in each.parts:
                if not NAME.fullmatch(part):
                    yield f"sets.{name}.parts: {part!r} cannot be a name: use letters, digits, - and _"
            for other in each.apart:
                yield from self._no_such_set(f"sets.{name}.apart", other)
                if set_ref(other).name == name:
                    yield f"sets.{name}.apart names the set itself"
            for other in each.may_overlap:
                yield from self._no_such_set(f"sets.{name}.may_overlap", other)

    def _unknown_stages(self) -> Iterable[str]:
        for name, stage in self.stages.items():
            for key in ("from", "reference"):
                ref = getattr(stage, "from_" if key == "from" else key, None)
                if ref is not None:
                    yield from self._no_such_state(f"stages.{name}.{key}", ref)
                elif key == "from" and not isinstance(stage, ModelStage):
                    yield f"stages.{name}.from: required, but not given: the stage it goes on from"
        for name, entry in self.answers.items():
            for ref in entry.stages:
                yield from self._no_such_state(f"answers.{name}.stages", ref)
        for name, probe in self.probes.items():
            if isinstance(probe, OfAnswers):
                yield from _unknown(f"probes.{name}.answers", probe.answers, self.answers, "answers entry")
            if isinstance(probe, OfStates):
                for ref in probe.stages:
                    yield from self._no_such_state(f"probes.{name}.stages", ref)

    def _no_such_state(self, where: str, ref: str) -> Iterable[str]:
        stage, which = stage_ref(ref)
        yield from _unknown(where, stage, self.stages, "stage")
        if which is not None and which != "last":
            yield f"{where}: {ref!r} names the state {which!r}; a stage gives NAME (its best, where it has one) or NAME@last"

    def _cycles(self) -> Iterable[str]:
        for kind, parents in (
            ("stages", {name: self.parents(name) for name in self.stages}),
            ("sets", {name: tuple(set_ref(other).name for other in each.apart) for name, each in self.sets.items()}),
        ):
            for name in parents:
                if path := _cycle(name, parents):
                    yield f"{kind}.{name}: a circle, {' -> '.join(path)}; nothing of it can come first"
                    return

    def _bases(self) -> Iterable[str]:
        for name, stage in self.stages.items():
            if isinstance(stage, AdapterStage) and not isinstance(self.stages[stage_ref(stage.from_).name], ModelStage):
                yield f"stages.{name}.from: an adapter lies on a stage of kind model, found {stage.from_!r}"
            elif isinstance(stage, AdapterStage) and self.stages[stage.from_].lora is None:
                yield f"stages.{name}: an adapter on {stage.from_}, of which lora: null trains the whole decoder"
            reference = getattr(stage, "reference", None)
            if reference is not None and self.base_of(stage_ref(reference).name) != self.base_of(name):
                yield f"stages.{name}.reference: {reference} is of another base; a reference shares the stage's"

    def _references_to_sets(self) -> Iterable[str]:
        for where, ref in self.used_sets():
            yield from self._no_such_set(where, ref)

    def used_sets(self) -> Iterable[tuple[str, str]]:
        """(place in the config, reference) of every set that a stage, an answers entry or a probe reads."""
        for name, stage in self.stages.items():
            if isinstance(stage, Stage):
                yield from ((f"stages.{name}.{place}", ref) for place, data in stage.reads.items() for ref in data.sets)
                if stage.validation is not None:
                    yield from ((f"stages.{name}.validation.watch", ref) for ref in stage.validation.watch)
        for name, entry in self.answers.items():
            yield from ((f"answers.{name}.sets", ref) for ref in entry.sets)
        for name, probe in self.probes.items():
            if isinstance(probe, OfStates):
                yield from ((f"probes.{name}.sets", ref) for ref in probe.sets)
            if isinstance(probe, PairsProbe):
                yield f"probes.{name}.training", probe.training

    def _no_such_set(self, where: str, ref: str) -> Iterable[str]:
        name, part = set_ref(ref)
        found = [*_unknown(where, name, self.sets, "set")]
        yield from found
        if not found and (part is not None or (self.sets[name].parts and self.sets[name].draw != "pyramid")):
            parts = self.sets[name].parts
            if part not in parts:
                known = ", ".join(f"{name}.{each}" for each in parts) or "no parts"
                yield f"{where}: {ref!r} is no part of set {name}, which has {known}"

    def _needs_tasks(self) -> Iterable[str]:
        for name, stage in self.stages.items():
            if isinstance(stage, Stage) and stage.task is not None:
                yield from _unknown(f"stages.{name}.task", stage.task, self.tasks, "task")
        for where, ref, task in self.asked_about():
            yield from self._gives_away(where, ref, task)
            if task is not None:
                if where.startswith(("answers.", "probes.")):
                    yield from _unknown(where, task, self.tasks, "task")
            elif len(self.tasks) != 1 and self.needs_task(ref):
                known = ", ".join(self.tasks) or "none"
                yield f"{where}: required, but not given: what is asked about the set {ref}; tasks of this study: {known}"

    def _probabilities(self) -> Iterable[str]:
        for name, entry in self.answers.items():
            task = self.task_of(entry.task)
            if entry.probability == "first-token" and not (
                task is not None and isinstance(task[1], LabelsTask) and task[1].form != "plain"
            ):
                yield f"answers.{name}.probability: first-token is of label lists in a <solution> block (form: think or solution)"

    def _gives_away(self, where: str, ref: str, name: str | None) -> Iterable[str]:
        """A prompt that names what is not known before the decision."""
        hidden = getattr(self.sources[self.sets[set_ref(ref).name].from_], "hidden", ())
        found = self.task_of(name) if name is None or name in self.tasks else None
        prompt = None if found is None else getattr(found[1], "prompt", None)
        for column in slots(prompt or ""):
            if column in hidden:
                yield (
                    f"{where}: the prompt of task {found[0]} names {{{column}}}, which is no input of set {ref}: what is asked, "
                    "or known only afterwards, would be given away; take it out"
                )

    def needs_task(self, ref: str) -> bool:
        """Rows of turns are questions already; all other cases need a task to be asked about."""
        return self.sources[self.sets[set_ref(ref).name].from_].kind != "rows"

    def asked_about(self) -> Iterable[tuple[str, str, str | None]]:
        """(place in the config, set, task) of every question that a stage, an answers entry or a probe asks."""
        for name, stage in self.stages.items():
            if isinstance(stage, Stage):
                watched = () if stage.validation is None else stage.validation.watch
                for ref in (*(ref for data in stage.reads.values() for ref in data.sets), *watched):
                    if stage.kind != "dpo":
                        yield f"stages.{name}.task", ref, stage.task
        for name, entry in self.answers.items():
            yield from ((f"answers.{name}.task", ref, entry.task) for ref in entry.sets)
        for name, probe in self.probes.items():
            if isinstance(probe, OfStates):
                yield from ((f"probes.{name}.task", ref, probe.task) for ref in probe.sets)

    def _probes_of_labels(self) -> Iterable[str]:
        for name, probe in self.probes.items():
            task = self.task_of(self.asked_by(probe).task)
            if task is None or not isinstance(task[1], LabelsTask):
                found = "none" if task is None else f"{task[0]}, which is {task[1].kind}"
                yield f"probes.{name}: probes are of label lists, answers of a task of kind labels; found {found}"

    def _roles(self) -> Iterable[str]:
        for where, ref in self.used_sets():
            each = self.sets[set_ref(ref).name]
            if each.role == "test" and not each.peek and not where.startswith(("answers.", "probes.")):
                yield (
                    f"{where}: {ref} is a test set, and what chooses, watches or trains on it makes it none; use another "
                    f"set, or set sets.{set_ref(ref).name}.peek to true, which every page will say"
                )


def _unknown(where: str, name: str, known: Mapping[str, Any], what: str) -> Iterable[str]:
    if name not in known:
        near = nearest(name, list(known))
        hint = f"; the nearest is {near!r}" if near else f"; there is no {what} in this study"
        yield f"{where}: no {what} is called {name!r}{hint}"


def _cycle(start: str, parents: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The path from `start` back to itself; empty where there is none.

    >>> _cycle("a", {"a": ("b",), "b": ("a",)})
    ['a', 'b', 'a']
    """

    def search(path: list[str], seen: set[str]) -> list[str]:
        for parent in parents.get(path[-1], ()):
            if parent == start:
                return [*path, parent]
            if parent not in seen:
                seen.add(parent)
                if found := search([*path, parent], seen):
                    return found
        return []

    return search([start], set())
