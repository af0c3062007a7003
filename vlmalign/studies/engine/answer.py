"""The one way in which a model answers questions, and the one record of what it answered: a prediction row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlmalign.mesh import Placement
from vlmalign.models.model import Params
from vlmalign.randomness import key_for
from vlmalign.rollout.completions import Generator
from vlmalign.rollout.sampling import Sampling
from vlmalign.studies.engine.base import Base
from vlmalign.studies.engine.texts import Texts
from vlmalign.tasks.tasks import AnyTask
from vlmalign.training.shared_rollouts import Answer, share_out
from vlmalign.types import Group

Row = dict[str, Any]

GREEDY = Sampling(temperature=0.0)


class Decoding(NamedTuple):
    """How questions are answered."""

    completion: int  #: longest answer, tokens
    rows: int  #: prompts at once
    multiple: int  #: tokens that prompt lengths are rounded up to
    samples: int = 1
    sampling: Sampling = GREEDY


def answerer(base: Base, questions: Texts, decoding: Decoding, where: Placement | None) -> Generator:
    """What answers these questions; its programs are compiled once."""
    return base.generator(
        questions.groups,
        rows=max(1, min(decoding.rows, len(questions.items))),
        group=decoding.samples,
        completion=decoding.completion,
        multiple=decoding.multiple,
        sampling=decoding.sampling,
        where=where,
    )


def answer(
    base: Base,
    generator: Generator,
    policy: Params,
    questions: Texts,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Answer]]:
    """The answers to each question, in order; several processes share them out, and all get all.

    `advance(n)` is called as n more questions of this process's share are done.
    """

    def own(share: Sequence[Group]) -> list[list[Answer]]:
        rows = generator.run(policy, share, key_for(seed, 0, "rollout"), advance=advance)
        return [[Answer(found, base.front.chat.decode(found.tokens)) for found in row] for row in rows]

    return share_out(questions.groups, own)


def predictions(
    task: AnyTask,
    questions: Texts,
    answers: Sequence[Sequence[Answer]],
    *,
    stage: str,
    dataset: str,
    labels: Sequence[str],
    name_image: Callable[[Path], str],
    probabilities: Sequence[Sequence[Mapping[str, float] | None]] | None = None,
) -> list[Row]:
    """One row for each answer. `labels`: the names that the set's truth is told in, where it has labels; `probabilities`:
    of these labels, for each answer, where they were computed."""
    rows = []
    given = [None] * len(answers) if probabilities is None else probabilities
    for question, case, own, likely in zip(questions.items, questions.cases, answers, given, strict=True):
        for sample, (completion, text) in enumerate(own):
            facts = task.read(text, question.columns)
            said = facts.values
            if labels:
                said = [label for label in labels if label in said]
            row = {
                "stage": stage,
                "dataset": dataset,
                "id": case.id,
                "patient": case.patient,
                "truth": task.truth(case),
                "predicted": list(said) if isinstance(said, tuple) else said,
                "valid": facts.valid,
                "unknown": list(facts.unknown),
                "reason": facts.reason,
                "reasoning": facts.reasoning,
                "completion": text,
                "tokens": len(completion.tokens),
                "stopped": completion.stopped,
                "image": None if case.image is None else name_image(case.image),
            }
            if likely is not None:  # an answer that is not valid names nothing
                row["probability"] = likely[sample] if facts.valid else None
            rows.append(row if len(own) == 1 else {**row, "sample": sample})
    return rows
