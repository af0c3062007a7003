"""Makes one artefact: a set, a stage of training, answers, scores. Each is begun, made, and finished by its record, which
process 0 has."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vlmalign import stopping
from vlmalign.data.sources.inventing import PARTIAL
from vlmalign.distributed import own_share, process_count
from vlmalign.exchange import fetch, from_first
from vlmalign.progress import Progress
from vlmalign.rollout.features import Pictures
from vlmalign.rollout.sampling import Sampling
from vlmalign.studies.engine.answer import Decoding, answer, answerer, predictions
from vlmalign.studies.engine.answers_config import Answers
from vlmalign.studies.engine.base import Base, State
from vlmalign.studies.engine.config import stage_ref
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.files import digest_of, manifest, write_json, write_rows
from vlmalign.studies.engine.first_token import first_token_probabilities
from vlmalign.studies.engine.folder import open_to_group
from vlmalign.studies.engine.graph import Edge, Node
from vlmalign.studies.engine.image_names import image_names
from vlmalign.studies.engine.learn import run_dpo, run_sft
from vlmalign.studies.engine.opened import Opened
from vlmalign.studies.engine.policy import run_policy
from vlmalign.studies.engine.record import BEGUN, MADE, Record, begin, finish
from vlmalign.studies.engine.score import score_answers
from vlmalign.studies.engine.sets import CASES, draw, patients_of
from vlmalign.studies.engine.stage_config import AdapterStage, Dpo, ModelStage, Sft
from vlmalign.studies.engine.states import REFERENCE, read_state, save_states, shrink, state_ids
from vlmalign.studies.engine.texts import Texts
from vlmalign.studies.engine.work import StageTexts, Work
from vlmalign.tasks.tasks import AnyTask
from vlmalign.training.loop import Finished
from vlmalign.training.outcome import BEST, NEWEST
from vlmalign.training.recorded_rewards import PRINTED
from vlmalign.weights.export import export_adapter
from vlmalign.weights.whole import export_whole

#: files of a stage that say when and where, and differ between a run and its repetition
RECORDS = (BEGUN, MADE)
#: what `vlmalign report` writes beside a stage's files, and writes again
PAGES = ("completions.html", "completions", "model_card.md")
PREDICTIONS, RESULTS, LEFT_OUT = "predictions.jsonl", "results.json", "left_out.jsonl"


@dataclass(frozen=True)
class Making:
    """An artefact that is being made."""

    node: Node
    study: Opened
    record: Record | None  #: process 0 has it
    versions: Mapping[str, Any]
    progress: Progress
    check: Callable[[], None]  #: raises ValueError, in process 0, once it is another's

    @property
    def folder(self) -> Path:
        return self.node.folder(self.study.config.run)

    def begin(self) -> None:
        begin(self.folder, self.record, self.versions)

    def advance(self) -> Callable[[int], None]:
        """What is told of as many more cases as are done, where nothing is kept before all are; and stops there."""
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            stopping.check(f"{self.node.name} was not finished, and is made anew")
            done += count
            self.progress.update(done)

        return advance

    def keep(self, key: str, file: str, write: Callable[[Path], None]) -> None:
        """The artefact as what `write` makes of the path of its `file`, whose content is known as `key`; whole."""
        self.check()
        self.begin()
        write(self.folder / file)
        hashes = self.study.hashes
        self.finish({key: hashes.of(self.folder / file)}, files=manifest(self.folder, hashes, RECORDS))

    def finish(self, content: Mapping[str, Any], **more: Any) -> None:
        """Write its record, by which it is whole."""
        self.check()
        open_to_group(self.study.config, self.folder)
        finish(self.folder, self.record, content, self.versions, **more)


def make_source(making: Making) -> None:
    """An invented data set, written whole by process 0; its record lies beside its files."""
    study, config = making.study, making.study.config

    def write() -> None:
        section = config.sources[making.node.key]
        root = config.place(section.root)
        if root.is_relative_to(config.run):
            for left in root.parent.glob(
                f"{root.name}.*{PARTIAL}"
            ):  # of a start that was killed: this one has the lock
                shutil.rmtree(left)
        section.invent(config.place)
        making.folder.mkdir(parents=True, exist_ok=True)
        making.finish({"files": digest_of(manifest(root, study.hashes, RECORDS))})

    from_first(write)


def make_set(making: Making) -> None:
    """Draw a set; process 0 does."""
    study, key, folder = making.study, making.node.key, making.folder
    section = study.config.sets[key]
    source = study.source(section.from_)

    def write() -> None:
        making.begin()
        left_out = {patient for ref in section.apart for patient in patients_of(study.config, ref)}
        draw(study.config, key, source, left_out, folder, making.progress)
        parts = list(section.parts) or [CASES]
        content = {part: study.hashes.of(folder / f"{part}.jsonl") for part in parts}
        making.finish(content, files=manifest(folder, study.hashes, RECORDS))

    from_first(write)


def make_stage(making: Making, base: Base, *, last_use: bool) -> None:
    """Train a stage, continuing one that was begun; keep its states and export what it goes on from."""
    study, node, folder = making.study, making.node, making.folder
    config, stage, texts = study.config, study.config.stages[node.key], study.texts[node.key]
    from_first(lambda: _begin_stage(making, texts))
    # Siblings share their draws; two stages on the same prompts, one after the other, must not.
    seed = int(np.random.SeedSequence([config.seed_of(node.key), config.depth_of(node.key)]).generate_state(1)[0] >> 1)
    start = state_of(study, base, node.parents["from"])
    work = Work(
        node.key,
        base,
        start,
        start if "reference" not in node.parents else state_of(study, base, node.parents["reference"]),
        study.spec(node.key),
        texts,
        study.task_of_stage(node.key),
        folder,
        seed,
        config.seed_of(node.key),
        last_use,
        making.progress,
        making.check,
        image_names(config),
    )
    if isinstance(stage, Sft):
        found = run_sft(stage, work)
    elif isinstance(stage, Dpo):
        found = run_dpo(stage, work)
    else:
        found = run_policy(stage, work, study.built[node.key].rewards)
    from_first(making.check)
    save_states(folder, found)
    export(study, node, base, work, found)

    def write() -> None:
        if stage.keep == "states":
            shrink(folder)
        content = state_ids(folder, study.hashes)
        files = manifest(folder, study.hashes, (*RECORDS, NEWEST, BEST, REFERENCE, PRINTED, *PAGES))
        steps = {"step": found.step, "best_step": found.best_step}
        making.finish(content, files=files, steps=steps)

    from_first(write)


def _begin_stage(making: Making, texts: StageTexts) -> None:
    making.begin()
    parts = {"train": texts.train, "sft": texts.beside, "validation": texts.validation}
    rows = [{"set": name, **left._asdict()} for name, part in parts.items() if part for left in part.left_out]
    write_rows(making.folder / LEFT_OUT, rows)


def export(study: Opened, node: Node, base: Base, work: Work, found: Finished) -> None:
    """What other tools load: a PEFT folder, or after training the whole decoder a checkpoint folder; written once, read
    again and compared before it has its name. It is the state that others go on from: the best where there is one."""
    whole = work.spec is None
    folder = node.folder(study.config.run) / ("model" if whole else "adapter")
    params = found.last if found.best is None else found.best
    frozen = base.params
    if process_count() > 1:  # one of them writes, from what it holds by itself
        params = fetch(params)
        frozen = {} if whole else base.devices.bring(base.params, base.devices.sampling())

    def write() -> None:
        if folder.exists():
            return
        if whole:
            export_whole(folder, base.front.path, work.model, params)
        else:
            export_adapter(folder, work.model, frozen, params, base_path=str(base.front.path))

    from_first(write)


def state_of(study: Opened, base: Base, edge: Edge) -> State:
    """The parameters that a stage ended with, or those of an adapter; none of a plain model."""
    name = edge.node.partition("/")[2]
    stage = study.config.stages[name]
    if isinstance(stage, ModelStage):
        return State({}, None)
    spec = study.spec(name)
    if isinstance(stage, AdapterStage):
        # A copy: training gives the buffers of what it begins with back, and others may go on from this adapter.
        return State({key: jnp.array(value) for key, value in study.adapters[name].params.items()}, spec)
    params = read_state(study.config.run / edge.node, edge.which)
    return State(base.devices.place(base.model(spec), params), spec)


def make_answers(making: Making, base: Base) -> None:
    """Answer a set; several processes share it out."""
    study, node = making.study, making.node
    entry = study.config.answers[node.key]
    task = study.task_of_answers(entry, node.set)
    found = study.questions(Data(set=node.set), task, stage_ref(node.stage).name)
    rows = answered(making, base, entry, task, found)
    from_first(lambda: making.keep("rows", PREDICTIONS, lambda path: write_rows(path, rows)))


def answered(
    making: Making, base: Base, entry: Answers, task: AnyTask, found: Texts, *, pictures: Pictures | None = None
) -> list[dict[str, Any]]:
    """The prediction rows of a state to the questions `found`, as the entry has them answered; `pictures`: what films are
    read by in place of the base's own reader."""
    study, node, progress = making.study, making.node, making.progress
    decoding = Decoding(
        entry.completion, entry.rows, entry.prompt_multiple, entry.samples, Sampling(entry.temperature, entry.top_p)
    )
    where = base.devices.sampling(entry.tensor)
    generator = answerer(base, found, decoding, where)
    if pictures is not None:
        generator = replace(generator, features=base.features.reading(pictures))
    films = "" if node.variant is None else f" ({node.variant})"
    progress.stage(f"answer {node.set}{films}, {node.stage}", max(1, len(own_share(found.items))))
    state = state_of(study, base, node.parents["stage"])
    policy = base.policy(state, where)
    answers = answer(base, generator, policy, found, seed=study.config.seed, advance=making.advance())
    labels = study.cases(node.set).labels
    probabilities = None
    if entry.probability == "first-token":
        progress.stage(f"first tokens {node.set}, {node.stage}", max(1, sum(map(len, answers))))
        del policy  # a copy of the whole model
        policy = base.policy(state, where, decodes=False)
        probabilities = first_token_probabilities(
            base.model(None), policy, found.groups, [[each.text for each in own] for own in answers], labels,
            answer_ids=base.front.chat.answer_ids, features=generator.features, advance=making.advance(),
        )  # fmt: skip
    return predictions(
        task,
        found,
        answers,
        stage=node.stage,
        dataset=node.set,
        labels=labels,
        name_image=image_names(study.config),
        probabilities=probabilities,
    )


def make_scores(making: Making) -> None:
    """Score the answers of an entry; process 0 does."""

    def write() -> None:
        results = score_answers(making.study, making.node.key)
        making.keep("results", RESULTS, lambda path: write_json(path, results))

    from_first(write)
