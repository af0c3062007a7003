"""Preference pairs -> groups of two: a prompt with the chosen and the rejected answer, as TRL tokenises them.

Pairs come in the one form of `data.sources.layouts`: prompt, chosen and rejected are lists of turns. All go through the
checkpoint's chat template. Continuation 0 is the chosen answer, 1 the rejected one. The prompt ends where the first answer
begins, not where answers that begin alike come apart: tokens they share are part of both, for the losses that are not of
a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlmalign.data.chat.chat import Chat
from vlmalign.data.chat.messages import Message, label_weight
from vlmalign.types import Group, Segment


def preference_group(row: Mapping[str, Any], chat: Chat, *, group_id: int) -> Group:
    """The group of two that a pair makes.

    Raises:
        ValueError: for a pair that nothing can be learnt from, or that the chat template cannot write.
    """
    sides = {side: list(row[side]) for side in ("chosen", "rejected")}
    for side, answer in sides.items():
        if not answer or answer[0]["role"] != "assistant":
            role = answer[0]["role"] if answer else "nothing"
            raise ValueError(f'"{side}" must begin with an assistant turn, found {role}; give the answer alone')
        if not label_weight(answer[0]) > 0:
            raise ValueError(f'"{side}" begins with a turn of weight 0; such turns belong to the prompt')
        if not any(_text(turn).strip() for turn in answer if turn["role"] == "assistant"):
            raise ValueError(f'"{side}" is empty')
    # The prompt's own answers are context: labels begin with the turn that is compared.
    context = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in row["prompt"]]
    group = _join(*(chat.example([*context, *answer], group_id=group_id) for answer in sides.values()))
    one, other = group.continuations
    if np.array_equal(one.tokens, other.tokens) and np.array_equal(one.image, other.image):
        raise ValueError('"chosen" and "rejected" are the same tokens: there is no preference')
    return group


def _text(turn: Message) -> str:
    content = turn["content"]
    return content if isinstance(content, str) else "".join(part.get("text") or "" for part in content)


def _join(chosen: Group, rejected: Group) -> Group:
    """One group of both; the images of the rejected side are numbered as the union has them."""
    assert np.array_equal(chosen.prompt.tokens, rejected.prompt.tokens), "a prompt is written apart from its answers"
    images = tuple(dict.fromkeys((*chosen.images, *rejected.images)))
    # A last entry for -1, which stands for no image.
    number = np.array([*(images.index(key) for key in rejected.images), -1], np.int32)
    (other,) = rejected.continuations
    other = Segment(other.tokens, number[other.image], other.weight)
    return Group(chosen.id, chosen.prompt, (*chosen.continuations, other), images)
