"""How long a study's texts are and how many there are: counted where data and tokenizer are here, else by stated limits.

A length that is given stands. Otherwise the texts are made as the run makes them, from at most `SAMPLE` cases spread over
the data, and the longest counts; the question about a film needs no film. Where there is no tokenizer, or no data, the
limits of the section `data` count; last, of a question about films, its number of characters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.models.config import ModelConfig, SiglipConfig
from vlmalign.planning.workload import Lengths
from vlmalign.studies.engine.answers_config import Answers
from vlmalign.studies.engine.config import StudyConfig, set_ref
from vlmalign.studies.engine.data_config import Data
from vlmalign.studies.engine.stage_config import Dpo, Epochs, Policy
from vlmalign.types import Example, Group

#: cases that are counted at most
SAMPLE = 256
#: English has about so many characters to a token of these vocabularies; a turn's frame is about so many tokens
CHARACTERS, FRAME = 4, 16
#: what a question about films needs of one
FILM = Example("film", "patient", Path("film"), ())


class Given(NamedTuple):
    """Lengths in tokens that stand; None: not given."""

    prompt: int | None = None
    answer: int | None = None
    completion: int | None = None
    image: int | None = None  #: of all images of a prompt


class UnknownLength(ValueError):
    """A length that is neither given, nor counted, nor limited."""


@dataclass
class Texts:
    """The texts of a study. `folder` is for images that a table holds as bytes."""

    config: StudyConfig
    given: Given
    folder: Path
    _opened: dict[str, Any] = field(default_factory=dict)

    def number(self, data: Data) -> int | None:
        """How many cases there are; None where neither config nor data says it."""
        if len(data.sets) > 1:
            sizes = [self.number(part) for part in data.parts]
            return None if None in sizes else sum(sizes)
        for ref in data.sets:
            name, part = set_ref(ref)
            size = self.config.sets[name].parts.get(part or "", self.config.sets[name].size)
            if size is not None:
                return size
        cases = self._cases(data)
        return None if cases is None else len(cases)

    def of_stage(self, name: str, shape: ModelConfig) -> Lengths:
        """Of a stage that trains a model of this shape.

        Raises:
            ValueError: for a length that is not known (`UnknownLength`) or out of range, and a row that cannot be used.
        """
        stage, given = self.config.stages[name], self.given.completion
        if isinstance(stage, Epochs):
            return self._lengths(name, shape, stage.data, stage.task, stage, 1)
        limit = stage.rollout.completion
        if given is not None and given > limit:
            raise ValueError(f"completions have 1 to {limit} tokens (stages.{name}.rollout.completion), found {given}")
        return self._lengths(name, shape, stage.data, stage.task, None, limit)

    def of_answers(self, name: str, shape: ModelConfig, ref: str, entry: Answers) -> Lengths:
        """Of a set that a stage answers; raises as `of_stage`."""
        return self._lengths(name, shape, Data(set=ref), entry.task, None, entry.completion)

    def _lengths(
        self, name: str, shape: ModelConfig, data: Data, task: str | None, learns: Epochs | None, limit: int
    ) -> Lengths:
        given, groups = self.given, []
        if given.prompt is None or (learns is not None and given.answer is None):
            groups = self._groups(data, task, name, shape, learns)
        counted = f"counted: the longest of {len(groups)}" if len(groups) > 1 else "counted"
        images, answer, known = self._images(data, shape, groups), 1, {}
        prompts = (
            (given.prompt, "given"),
            (max((len(group.prompt) for group in groups), default=None), counted),
            (data.max_prompt, "the limit of the data"),
            (self._guess(data, task, images), "image tokens and a quarter of the prompt's characters"),
        )
        prompt, known["prompt"] = self._first("prompt", name, prompts)
        if learns is None:
            known["completion"] = "given" if given.completion else "the limit: every completion runs to its end"
        else:
            others = [stage.rollout.completion for stage in self.config.stages.values() if isinstance(stage, Policy)]
            others = others or [entry.completion for entry in self.config.answers.values()]
            answers = (
                (given.answer, "given"),
                (max((len(piece) for group in groups for piece in group.continuations), default=None), counted),
                (data.max_completion, "the limit of the data"),
                (max(others, default=None), "the limit of completions"),
            )
            answer, known["answer"] = self._first("answer", name, answers)
        return Lengths(prompt, answer, min(limit, given.completion or limit), images, known)

    def _first(self, what: str, name: str, ways: Sequence[tuple[int | None, str]]) -> tuple[int, str]:
        """The first number that there is, and how it was come by."""
        for number, how in ways:
            if number is not None:
                return number, how
        limit = {"prompt": "max_prompt", "answer": "max_completion"}[what]
        raise UnknownLength(
            f"stages.{name}: how long {what}s are is not known: there is no tokenizer.json in {self._base(name)}, or no data, "
            f"to count; set {limit} in its data section, or give --{what}-tokens"
        )

    def _images(self, data: Data, shape: ModelConfig, groups: Sequence[Group]) -> int:
        """Soft tokens of a prompt's images."""
        if shape.vision is None:
            return 0
        if groups:
            return max(
                sum(int((piece.image >= 0).sum()) for piece in (each.prompt, *each.continuations)) for each in groups
            )
        found = shape.vision.tokens if self.given.image is None else self.given.image
        if found is None and self._are_films(data):
            raise UnknownLength(
                "how many tokens an image has follows from its size in this family: give --image-tokens, or put the "
                "checkpoint's tokenizer and the films where the config says"
            )
        return found or 0

    def _guess(self, data: Data, task: str | None, images: int) -> int | None:
        """Tokens of the question about a film, by its characters."""
        labels = self._labels_task(data, task)
        if labels is None:
            return None
        contents = [turn["content"] for turn in labels.ask(FILM)]
        parts = [part for each in contents for part in ([{"text": each}] if isinstance(each, str) else each)]
        return images + FRAME + -(-sum(len(part.get("text", "")) for part in parts) // CHARACTERS)

    def _groups(
        self, data: Data, task: str | None, name: str, shape: ModelConfig, learns: Epochs | None
    ) -> Sequence[Group]:
        """Texts as the stage makes them, with answers for one that `learns`; none where they cannot be made here."""
        if len(data.sets) > 1:
            return [each for part in data.parts for each in self._groups(part, task, name, shape, learns)]
        path = self._base(name)
        if not (path / "tokenizer.json").is_file():
            return []
        cases = self._cases(data)
        if cases is not None:
            numbered = [(place + 1, cases[place]) for place in range(0, len(cases), -(-len(cases) // SAMPLE))]
        elif self._labels_task(data, task) is not None and isinstance(shape.vision, SiglipConfig):
            numbered, learns = [(1, FILM)], None
        else:
            return []
        # These load the tokenizer's library, which takes seconds.
        from vlmalign.studies.engine.texts import answers_to_learn, pairs_to_learn, questions
        from vlmalign.tasks.free import FreeTask

        make = questions if learns is None else pairs_to_learn if isinstance(learns, Dpo) else answers_to_learn
        found = self.config.task_of(task)
        asks = FreeTask(kind="free") if found is None else found[1]
        return make(iter(numbered), data, _chat(path, shape), asks, lambda key: None).groups

    def _base(self, name: str) -> Path:
        return self.config.place(self.config.stages[self.config.base_of(name)].path)

    def _source(self, ref: str) -> Any:
        return self.config.sources[self.config.sets[set_ref(ref).name].from_]

    def _labels_task(self, data: Data, task: str | None) -> Any | None:
        """The task, where it asks the same question about every film."""
        found = self.config.task_of(task)
        return found[1] if self._are_films(data) and found is not None and found[1].kind == "labels" else None

    def _are_films(self, data: Data) -> bool:
        return any(self._source(ref).kind != "rows" for ref in data.sets)

    def _cases(self, data: Data) -> Any:
        """Of a file of rows all, of a set those of its source; None where they are not here (yet)."""
        from vlmalign.data.sources.rows import RowSource

        if data.path is not None:
            section = RowSource(kind="rows", path=data.path, images=data.images, on_bad=data.on_bad)
        else:
            section = self._source(data.sets[0])
        if isinstance(section, RowSource):
            section = section.model_copy(update={"cache": self.folder})
        key = section.model_dump_json()
        if key not in self._opened:
            place = self.config.place(section.root if "root" in type(section).model_fields else section.path)
            self._opened[key] = section.open(self.config.place) if place.exists() else None
        return self._opened[key]


@cache
def _chat(path: Path, shape: ModelConfig) -> Any:
    from vlmalign.data.chat.chat import open_chat
    from vlmalign.studies.engine.base import open_front
    from vlmalign.studies.engine.sections import Reading

    if isinstance(shape.vision, SiglipConfig):  # no film is needed to count its tokens
        return open_chat(path, family=shape.family, image_tokens=lambda key: shape.vision.tokens)
    return open_front(path, Reading(), path, str(path)).chat
