"""Limits on the lengths of groups, in tokens. An image is kept whole or left out: no cut ever falls inside one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vlmalign.types import Group, Segment

ON_LONG = ("error", "skip", "truncate")


class Fitted(NamedTuple):
    """Groups within the limits, and what was done to the others: one sentence each, naming the group."""

    groups: list[Group]
    skipped: list[str]
    truncated: list[str]


def fit(groups: Iterable[Group], *, prompt: int | None, completion: int | None, on_long: str) -> Fitted:
    """The groups whose prompt has at most `prompt` tokens and each continuation at most `completion` (None: no limit).

    What happens to a longer one, by `on_long`:

    - "error": ValueError naming it;
    - "skip": it is left out;
    - "truncate": its continuations lose their end. What is left ends with a label, so that an image which the cut
      would fall into goes altogether, with the text before it that is there for the image alone (an answer cut short
      has no stop token: it does not teach to stop). Prompts are never cut, since the end of a prompt is the question:
      a group whose prompt is too long is left out, and so is one with a continuation that would lose every label.
    """
    if on_long not in ON_LONG:
        raise ValueError(f"on_long must be one of {', '.join(ON_LONG)}, found {on_long!r}")
    for name, limit in (("prompt", prompt), ("completion", completion)):
        if limit is not None and limit < 1:
            raise ValueError(f"the limit on {name} tokens must be >= 1, found {limit}")
    fitted = Fitted([], [], [])
    for group in groups:
        problem = _too_long(group, prompt, completion)
        if problem is None:
            fitted.groups.append(group)
        elif on_long == "error":
            raise ValueError(f"{problem}; raise the limit, shorten the row, or set on_long to skip or truncate")
        elif on_long == "skip" or (prompt is not None and len(group.prompt) > prompt):
            fitted.skipped.append(problem)
        else:
            cut = [_cut(piece, completion) for piece in group.continuations]
            if all(piece.weight.any() for piece in cut):
                fitted.groups.append(_with_images_in_use(replace(group, continuations=tuple(cut))))
                fitted.truncated.append(problem)
            else:
                fitted.skipped.append(f"{problem}, with no label among them")
    return fitted


def _too_long(group: Group, prompt: int | None, completion: int | None) -> str | None:
    if prompt is not None and len(group.prompt) > prompt:
        return f"group {group.id}: the prompt has {len(group.prompt)} tokens, more than {prompt}"
    longest = max(map(len, group.continuations), default=0)
    if completion is not None and longest > completion:
        return f"group {group.id}: a continuation has {longest} tokens, more than {completion}"
    return None


def _cut(piece: Segment, limit: int | None) -> Segment:
    """At most `limit` tokens, the last of them a label: soft tokens are none, so a cut image goes to its first token."""
    if limit is None or len(piece) <= limit:
        return piece
    labels = np.flatnonzero(piece.weight[:limit])
    end = int(labels[-1]) + 1 if len(labels) else 0
    return Segment(piece.tokens[:end], piece.image[:end], piece.weight[:end])


def _with_images_in_use(group: Group) -> Group:
    """Without the images that no token shows any more, which would be encoded for nothing."""
    pieces = (group.prompt, *group.continuations)
    kept = sorted({int(index) for piece in pieces for index in np.unique(piece.image) if index >= 0})
    number = np.full(len(group.images) + 1, -1, np.int32)  # the last entry is that of -1
    number[kept] = np.arange(len(kept))
    first, *rest = (Segment(piece.tokens, number[piece.image], piece.weight) for piece in pieces)
    return replace(group, prompt=first, continuations=tuple(rest), images=tuple(group.images[i] for i in kept))
