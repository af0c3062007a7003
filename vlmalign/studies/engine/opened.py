"""A study opened for work: sources, tokenizers, rewards and texts, all checked before anything is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmalign.data.films.images import load_image
from vlmalign.data.sources.films import Films
from vlmalign.data.sources.json_lines import read_texts
from vlmalign.data.sources.nih_boxes import read_boxes
from vlmalign.data.sources.rows import Rows, RowSource
from vlmalign.exchange import agree
from vlmalign.models.lora import LoraSpec
from vlmalign.studies.engine.answers_config import Answers
from vlmalign.studies.engine.base import Front, open_front
from vlmalign.studies.engine.config import StudyConfig, set_ref, stage_ref
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.files import Hashes, digest_of
from vlmalign.studies.engine.probe_config import OcclusionProbe
from vlmalign.studies.engine.rewards import Built, build_rewards, check_columns, count_labels, needs_turns
from vlmalign.studies.engine.sets import Cases, images_in, open_cases
from vlmalign.studies.engine.stage_config import AdapterStage, Dpo, Grpo, ModelStage, Policy, Sft, Stage, Trains
from vlmalign.studies.engine.texts import LeftOut, Numbered, Texts, answers_to_learn, pairs_to_learn, prompts, questions
from vlmalign.studies.engine.work import StageTexts, Watched
from vlmalign.tasks.free import FreeTask
from vlmalign.tasks.labels import ASKED, LabelsTask
from vlmalign.tasks.tasks import AnyTask
from vlmalign.weights.adapter import Adapter, load_adapter

#: a row that is so many times as long as the median one is worth a word
LONG = 10
#: what reads rows of turns where the study names no task
FREE_TASK = FreeTask(kind="free")


@dataclass
class Opened:
    """What the artefacts of a study are made with, opened as it is needed and only once."""

    config: StudyConfig
    hashes: Hashes
    written: StudyConfig  #: as the user wrote it, with what it leaves open
    started: datetime = field(
        default_factory=datetime.now
    )  #: when the run was first started: what a chat template that writes the date is told ever after
    trusted: bool = False  #: rewards' code runs wherever it lies
    fronts: dict[Path, Front] = field(default_factory=dict)
    sources: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, StageTexts] = field(default_factory=dict)
    built: dict[str, Built] = field(default_factory=dict)
    checked_images: set[str] = field(default_factory=set)

    def front(self, stage: str) -> Front:
        """What reads texts for the base of this stage."""
        base = self.config.base_of(stage)
        section: ModelStage = self.config.stages[base]
        path = self.config.place(section.path)
        if path not in self.fronts:
            self.fronts[path] = open_front(
                path, self.config.reading, self.config.run, f"stages.{base}.path", self._bits(), self.started
            )
        return self.fronts[path]

    def _bits(self) -> dict[Path, int]:
        """How many bits the 16-bit films of each source use, by its folder of films."""
        return {
            self.config.place(section.folder): section.bits
            for section in self.config.sources.values()
            if getattr(section, "bits", 16) != 16
        }

    @cached_property
    def adapters(self) -> dict[str, Adapter]:
        """The PEFT folders of the study, checked against their bases.

        Raises:
            ValueError: for one of another base, or with other settings than its section says.
        """
        found = {}
        for name, stage in self.config.stages.items():
            if not isinstance(stage, AdapterStage):
                continue
            try:
                found[name] = load_adapter(self.config.place(stage.path), self.front(name).shape)
            except ValueError as error:
                raise ValueError(f"stages.{name}.path: {error}") from error
            if stage.lora is not None:
                _check_adapter(f"stages.{name}.lora", stage, found[name].spec)
        return found

    def spec(self, name: str) -> LoraSpec | None:
        """The adapter that a stage trains or is; None for a plain model and where the whole decoder is trained."""
        stage = self.config.stages[name]
        if isinstance(stage, AdapterStage):
            own = self.adapters[name].spec
            # Dropout is no part of what an adapter is; it belongs to its further training.
            return own if stage.lora is None else LoraSpec(**{**vars(own), "dropout": stage.lora.dropout})
        parent = stage_ref(stage.from_).name
        above = self.config.stages[parent]
        if isinstance(above, ModelStage):
            return None if above.lora is None else above.lora.spec
        return self.spec(parent)

    def source(self, name: str) -> Any:
        """A source, opened."""
        if name not in self.sources:
            section = self.config.sources[name]
            try:
                self.sources[name] = section.open(self.config.place)
            except (ValueError, OSError) as error:
                raise type(error)(f"sources.{name}: {error}") from error
        return self.sources[name]

    def cases(self, ref: str) -> Cases:
        """A drawn set."""
        return open_cases(self.config, ref, self.source(self.config.sets[set_ref(ref).name].from_))

    def task(self, name: str | None, data: Data) -> AnyTask:
        """What is asked about these cases: the task of this name; for rows of turns their own, for all others the study's
        only one.

        Raises:
            ValueError: when nothing says what is asked.
        """
        if name is None and self._has_turns(data):
            return FREE_TASK
        found = self.config.task_of(name)
        if found is None:
            raise ValueError(
                f"{data.origin}: nothing says what is asked about its cases; give `task`, one of "
                f"{', '.join(self.config.tasks) or 'tasks, a section that this study does not have'}"
            )
        return found[1]

    def _has_turns(self, data: Data) -> bool:
        """Whether these cases say themselves what is asked. Archives of films never do, and need not be there yet."""
        if data.path is not None:
            return self.rows(data).layout != "records"
        names = [self.config.sets[set_ref(ref).name].from_ for ref in data.sets]
        return all(
            isinstance(self.config.sources[name], RowSource) and self.source(name).layout != "records" for name in names
        )

    def task_of_stage(self, name: str) -> AnyTask:
        stage = self.config.stages[name]
        return self.task(stage.task, stage.data)

    def task_of_answers(self, entry: Answers, ref: str) -> AnyTask:
        return self.task(entry.task, Data(set=ref))

    def numbered(self, data: Data) -> Numbered:
        """The cases that a stage reads, with the numbers that their draws are derived from; all processes call this.

        Of several sets that tell their truth in different labels, a case is asked for those of its own.
        """
        if data.path is not None:
            rows = self.rows(data)
            return ((i + 1, rows[i]) for i in range(len(rows)))
        drawn = [self.cases(ref) for ref in data.sets]
        for cases in drawn:
            # Other cases would make other batches: processes would compute different things, or wait for ever.
            agree(digest_of([row["sha256"] for row in cases.rows]), f"the cases of set {cases.name}")
        found = _together(drawn)
        return found if data.traces is None else self._with_traces(found, data.traces)

    def _with_traces(self, numbered: Numbered, file: Path) -> Numbered:
        traces = read_texts(self.config.place(file), "id", "trace")
        for number, case in numbered:
            yield number, replace(case, meta={**case.meta, "trace": traces.get(case.id)})

    def rows(self, data: Data) -> Rows:
        """A file of rows that a stage names itself."""
        key = f"file {data.path} {data.images} {data.on_bad}"
        if key not in self.sources:
            section = RowSource(kind="rows", path=data.path, images=data.images, on_bad=data.on_bad)
            try:
                self.sources[key] = section.open(self.config.place)
            except FileNotFoundError as error:
                raise ValueError(f"{error}; the working directory is {Path.cwd()}") from error
        return self.sources[key]

    def build_rewards(self, name: str) -> None:
        """Load and check the rewards of a policy stage."""
        stage = self.config.stages[name]
        self.built[name] = build_rewards(stage, self.task_of_stage(name), f"stages.{name}", trusted=self.trusted)

    def open_stage(self, name: str, say: Callable[[str], None]) -> None:
        """Read and check what a stage that trains reads: its texts, and its rewards.

        Raises:
            ValueError: naming file and line of a row that cannot be used, a column that a reward needs; and when there
                are fewer cases than an update takes.
        """
        stage: Trains = self.config.stages[name]
        where, task = f"stages.{name}", self.task_of_stage(name)
        train = self._texts(stage, stage.data, task, name)
        needed, unit = (stage.prompts, "prompts") if isinstance(stage, Policy) else (stage.batch, "batch")
        if len(train.items) < needed:
            raise ValueError(
                f"{where}: {stage.data.origin} gives {len(train.items)} rows, fewer than {unit} = {needed}{_because(train)}"
            )
        beside = self._beside(stage, task, name)
        validation, watched = None, []
        if stage.validation is not None:
            data = stage.validation.data
            validation = self._texts(stage, data, task, name)
            if not validation.items:
                raise ValueError(f"{where}: {data.origin} gives no row to validate on{_because(validation)}")
            if stage.validation.answers and not isinstance(stage, Policy):
                watched.append(Watched("validation", self.questions(data, task, name), self._labels(data)))
            for ref in stage.validation.watch:
                shown = Data(set=ref)
                watched.append(Watched(ref, self.questions(shown, task, name), self._labels(shown)))
        if isinstance(stage, Policy):
            rewards = self.built[name].rewards
            check_columns(stage, rewards, train, stage.data.origin)
            if stage.label_dropout and not isinstance(task, LabelsTask):
                raise ValueError(
                    f"{where}.label_dropout drops true labels, and task {task.kind} has none; leave it out"
                )
            truth = [item.columns.get("truth") for item in train.items]
            self.built[name] = count_labels(self.built[name], stage, task, truth, where)
            if validation is not None:
                check_columns(stage, rewards, validation, stage.validation.data.origin)
        self.texts[name] = StageTexts(train, validation, tuple(watched), beside)
        say(f"stage {name} ({stage.kind}): {_counts(stage, self.texts[name])}")
        if (warning := _extreme(name, train)) is not None:
            say(warning)

    def questions(self, data: Data, task: AnyTask, stage: str, numbered: Numbered | None = None) -> Texts:
        """Cases as questions to the base of a stage; `numbered`: those of the data, changed."""
        numbered = self.numbered(data) if numbered is None else numbered
        return questions(numbered, data, self.front(stage).chat, task, self._check_image)

    def _beside(self, stage: Trains, task: AnyTask, name: str) -> Texts | None:
        """The answers of an SFT loss beside a policy's."""
        mix = stage.sft if isinstance(stage, Grpo) else None
        if mix is None:
            return None
        found = answers_to_learn(self.numbered(mix.data), mix.data, self.front(name).chat, task, self._check_image)
        if len(found.items) < mix.batch:
            raise ValueError(
                f"stages.{name}.sft: {mix.data.origin} gives {len(found.items)} rows, fewer than batch = {mix.batch}"
                f"{_because(found)}"
            )
        return found

    def _columns(self, data: Data) -> list[str]:
        """What is known of some film of several sets, and must be told of all of them."""
        sources = [self.cases(ref).source for ref in data.sets] if len(data.sets) > 1 else []
        return sorted({column for source in sources if isinstance(source, Films) for column in source.columns})

    def _texts(self, stage: Trains, data: Data, task: AnyTask, name: str) -> Texts:
        turns_too = isinstance(stage, Policy) and needs_turns(stage)
        policy = partial(prompts, turns_too=turns_too, columns=self._columns(data))
        make = {Sft: answers_to_learn, Dpo: pairs_to_learn}.get(type(stage), policy)
        found = make(self.numbered(data), data, self.front(name).chat, task, self._check_image)
        if data.path is None:
            return found
        skipped = [LeftOut(row["id"], "skipped", row["reason"]) for row in self.rows(data).skipped]
        return found._replace(left_out=[*skipped, *found.left_out])

    def _labels(self, data: Data) -> tuple[str, ...]:
        return self.cases(data.sets[0]).labels if data.sets else ()

    def _check_image(self, key: str) -> None:
        """Decode an image once, at a fraction of its size; drawn films have been."""
        if key not in self.checked_images:
            load_image(key, size_hint=64)
            self.checked_images.add(key)

    def inputs(self, name: str) -> dict[str, str]:
        """What a stage reads beside its parents -> SHA-256."""
        stage = self.config.stages[name]
        if isinstance(stage, ModelStage):
            return {"checkpoint": self.hashes.of_folder(self.config.place(stage.path))}
        if isinstance(stage, AdapterStage):
            return {"adapter": self.hashes.of_folder(self.config.place(stage.path))}
        found = {} if name not in self.built else dict(self.built[name].files)
        for role, data in stage.reads.items():
            if data.traces is not None:
                found[f"{role} traces"] = self.hashes.of(self.config.place(data.traces))
            if data.path is not None:
                found[role] = digest_of([self.hashes.of(file) for file in self.rows(data).files])
                if images := sorted(set(images_in([rows.meta for rows in self.rows(data)]))):
                    found[f"{role} images"] = digest_of([self.hashes.of(Path(image)) for image in images])
        return found


def check_labels(config: StudyConfig, sources: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the place in the config, for a set with labels that its task does not know."""
    for where, ref, task_name in config.asked_about():
        task = config.task_of(task_name)
        source = sources.get(config.sets[set_ref(ref).name].from_)
        if task is None or not isinstance(task[1], LabelsTask) or source is None:
            continue
        if not isinstance(source, Films):
            raise ValueError(f"{where}: task {task[0]} reads labels, and set {ref} is rows without any")
        if unknown := [label for label in source.schema.labels if label not in task[1].names]:
            raise ValueError(
                f"{where}: set {ref} has labels that task {task[0]} does not: {', '.join(unknown[:5])}; add them to the "
                f"task, or map them (sources.{config.sets[set_ref(ref).name].from_}.label_map)"
            )


def check_subgroups(config: StudyConfig, sources: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the place in the config, for a subgroup of which no film of the entry's sets knows anything."""
    for name, entry in config.answers.items():
        found = [sources.get(config.sets[set_ref(ref).name].from_) for ref in entry.sets]
        if not all(isinstance(source, Films) for source in found):
            continue  # not there yet, or rows, whose columns may differ from row to row
        known = sorted({column for source in found for column in source.columns})
        for column in entry.subgroups:
            if column not in known:
                raise ValueError(
                    f"answers.{name}.subgroups: no film of its sets has {column!r}; known of them: {', '.join(known)}"
                )


def check_boxes(config: StudyConfig, sources: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the probe, for a list of boxes that is missing or damaged, where its films are there already."""
    for name, probe in config.probes.items():
        if isinstance(probe, OcclusionProbe) and any(
            config.sets[set_ref(ref).name].from_ in sources for ref in probe.sets
        ):
            try:
                read_boxes(config.place(probe.boxes))
            except (ValueError, OSError) as error:
                raise ValueError(f"probes.{name}.boxes: {error}") from error


def _check_adapter(where: str, stage: AdapterStage, spec: LoraSpec) -> None:
    """What the tensors mean must be said in the config too, where it is said at all."""
    names = ("rank", "alpha", "targets", "rank_stabilised", "magnitude")
    differ = [name for name in names if getattr(stage.lora, name) != getattr(spec, name)]
    if differ:
        rest = ", ".join(f"{name}: {getattr(spec, name)!r}" for name in names)
        raise ValueError(
            f"{where} must be as in the adapter {stage.path}, found another {', '.join(differ)}; "
            f"the adapter has {rest.replace('(', '[').replace(')', ']')}"
        )


def _together(drawn: Sequence[Cases]) -> Numbered:
    """The cases of all sets. Numbers go on from source to source, so that no two cases have the same draws."""
    differ = len({cases.labels for cases in drawn}) > 1
    first = 0
    for cases in drawn:
        asked = {ASKED: list(cases.labels)} if differ else {}
        for i, place in enumerate(cases.places):
            case = cases[i]
            yield first + int(place), replace(case, meta={**case.meta, **asked}) if asked else case
        first += len(cases.source)


def _because(texts: Texts) -> str:
    if not texts.left_out:
        return ""
    first = texts.left_out[0]
    return f" ({len(texts.left_out)} were left out or cut, such as {first.name}: {first.reason})"


def _counts(stage: Stage, texts: StageTexts) -> str:
    found = {"data": texts.train, "sft.data": texts.beside, "validation.data": texts.validation}
    said = []
    for data, part in ((data, found[place]) for place, data in stage.reads.items()):
        counts = {what: sum(left.what == what for left in part.left_out) for what in ("skipped", "truncated")}
        left = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        longest, median = _lengths(part)
        tokens = f", {median:g} tokens in the median, {longest} at most"
        said.append(f"{len(part.items)} rows of {data.origin}" + (f" ({left})" if left else "") + tokens)
    return "; ".join(said)


def _lengths(texts: Texts) -> tuple[int, float]:
    """Tokens of the longest row, and of the median one, each with its longest answer."""
    lengths = [
        len(group.prompt) + max((len(each) for each in group.continuations), default=0) for group in texts.groups
    ]
    return max(lengths), float(np.median(lengths))


def _extreme(name: str, texts: Texts) -> str | None:
    """What to say of a row that is far longer than the others: a batch is as wide as its longest row."""
    longest, median = _lengths(texts)
    if longest < LONG * median:
        return None
    groups = texts.groups
    case = max(zip(groups, texts.cases, strict=True), key=lambda pair: len(pair[0].prompt))[1].id
    return (
        f"warning: stage {name}: the longest row has {longest} tokens, the median one {median:g}, and every batch that holds "
        f"it is as wide; the longest prompt is that of {case}. max_prompt, max_completion and on_long limit rows"
    )
