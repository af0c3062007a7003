"""A label's probability as that of its first token at `<solution>`, given the question, the film and the answer's reasoning.

    p(label) = p(first token of the label | question, answer up to <solution>)

The answer is cut after `<solution>`, and each label is written there. Where their tokens first differ from one another, or
from the answer as cut, is the place at which the model chooses: the label's token there is its first one. Labels that begin
with one token have one probability. Only one token can stand at that place, so the probabilities of all of them sum to at
most 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.evaluation.scoring import score_groups, text_segment
from vlmalign.models.model import Model, Params
from vlmalign.rollout.features import FeatureStore
from vlmalign.types import Group, Segment

#: an answer up to where its labels begin, white space of its own included
BEFORE = re.compile(r".*<solution>\s*", re.DOTALL)

#: the beginning of an answer -> its token ids (`Chat.answer_ids`)
AnswerIds = Callable[[str], list[int]]


class Place(NamedTuple):
    """Where an answer chooses its first label."""

    group: Group  #: question and answer up to there; a continuation for each token that a label begins with
    token: Mapping[str, int]  #: label -> place of its token among the continuations


def place_of(prompt: Group, answer_ids: AnswerIds, answer: str, labels: Sequence[str]) -> Place | None:
    """The place of an answer's first label; None for one that has not exactly one `<solution>`."""
    before = BEFORE.match(answer)
    if before is None or answer.count("<solution>") != 1:
        return None
    written = {label: answer_ids(before[0] + label) for label in labels}
    at = _differ([answer_ids(before[0]), *written.values()])
    at = min(at, *(len(ids) - 1 for ids in written.values()))
    first = {label: ids[at] for label, ids in written.items()}
    tokens = list(dict.fromkeys(first.values()))
    lead = text_segment(next(iter(written.values()))[:at])
    joined = Segment(
        *(
            np.concatenate([getattr(each, name) for each in (prompt.prompt, lead)])
            for name in ("tokens", "image", "weight")
        )
    )
    return Place(
        Group(prompt.id, joined, tuple(text_segment([token]) for token in tokens), prompt.images),
        {label: tokens.index(token) for label, token in first.items()},
    )


def first_token_probabilities(
    model: Model,
    params: Params,
    prompts: Sequence[Group],
    answers: Sequence[Sequence[str]],
    labels: Sequence[str],
    *,
    answer_ids: AnswerIds,
    features: FeatureStore | None,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[dict[str, float] | None]]:
    """Label -> probability for every answer to every prompt; None where there is no place for a label."""
    places = [
        [place_of(prompt, answer_ids, each, labels) for each in own]
        for prompt, own in zip(prompts, answers, strict=True)
    ]
    known = [place for own in places for place in own if place is not None]
    scores = iter(
        score_groups(
            model, params, [place.group for place in known], features=features, advance=lambda done: advance(len(done))
        )
    )

    def probabilities(place: Place) -> dict[str, float]:
        found = next(scores)
        return {label: float(np.exp(found[token].total)) for label, token in place.token.items()}

    return [[None if place is None else probabilities(place) for place in own] for own in places]


def _differ(lines: Sequence[Sequence[int]]) -> int:
    """The first place at which not all lines are the same; that of the end of the shortest, where none differs before.

    >>> _differ([(1, 2, 3), (1, 2, 4)]), _differ([(1,), (1, 2)])
    (2, 1)
    """
    at = 0
    while all(at < len(line) and line[at] == lines[0][at] for line in lines):
        at += 1
    return at
