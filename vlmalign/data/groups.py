"""Groups of tokens -> rectangular batches. A batch has a static layout (P; K x C): few shapes, few compilations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlmalign.types import Group, GroupBatch, Layout, Segment


def round_up(length: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is >= `length`, at least one multiple.

    >>> round_up(33, 32), round_up(0, 32)
    (64, 32)
    """
    return max(1, -(-length // multiple)) * multiple


def layout_of(groups: Sequence[Group], *, prompt_multiple: int, completion_multiple: int) -> Layout:
    """The smallest layout that holds every group, lengths rounded up to the multiples (tokens)."""
    counts = {len(g.continuations) for g in groups}
    if len(counts) != 1:
        raise ValueError(f"groups of one batch must have the same number of continuations, found {sorted(counts)}")
    prompt = round_up(max(len(g.prompt) for g in groups), prompt_multiple)
    longest = max((len(c) for g in groups for c in g.continuations), default=0)
    return Layout(prompt, counts.pop(), round_up(longest, completion_multiple) if longest else 0)


def collate(
    groups: Sequence[Group],
    layout: Layout,
    *,
    rows: int,
    image_tokens: Callable[[str], int],
) -> tuple[GroupBatch, list[str]]:
    """One row per group, padded to `rows`; returns the batch and its distinct images in the order of `features`.

    `image_tokens(key)` is the number of soft tokens of an image. In the batch, `image` points into the features of
    the returned images laid end to end.

    Raises:
        ValueError: naming the group whose prompt or continuation does not fit the layout, that has another number of
            continuations, an empty prompt, or a run of image tokens of the wrong length.
    """
    if len(groups) > rows:
        raise ValueError(f"{len(groups)} groups do not fit {rows} rows")
    keys: list[str] = []
    start: dict[str, int] = {}
    total = 0
    for key in (key for g in groups for key in g.images):
        if key not in start:
            start[key] = total
            keys.append(key)
            total += image_tokens(key)
    shape = (rows, layout.row)
    tokens, order = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segment, image, block = (np.full(shape, -1, np.int32) for _ in range(3))
    weight = np.zeros((rows, layout.group, layout.completion), np.float32)
    group_id = np.full((rows,), -1, np.int32)
    for row, group in enumerate(groups):
        _check(group, layout)
        group_id[row] = group.id
        blocks = 0
        pieces = [(0, 0, 0, group.prompt)]
        for k, continuation in enumerate(group.continuations):
            pieces.append((layout.prompt + k * layout.completion, k + 1, len(group.prompt), continuation))
            weight[row, k, : len(continuation)] = continuation.weight
        for column, number, first, piece in pieces:
            span = slice(column, column + len(piece))
            tokens[row, span] = piece.tokens
            segment[row, span] = number
            order[row, span] = first + np.arange(len(piece))
            for begin, end, index in _image_runs(piece, group, image_tokens):
                at = slice(column + begin, column + end)
                image[row, at] = start[group.images[index]] + np.arange(end - begin)
                block[row, at] = blocks
                blocks += 1
    batch = GroupBatch(
        tokens=tokens,
        segment=segment,
        order=order,
        position=order,
        image=image,
        block=block,
        weight=weight,
        group_id=group_id,
    )
    return batch, keys


def _check(group: Group, layout: Layout) -> None:
    longest = max((len(c) for c in group.continuations), default=0)
    if len(group.prompt) == 0:
        raise ValueError(f"group {group.id}: the prompt is empty; text without a prompt takes BOS as its prompt")
    if len(group.continuations) != layout.group:
        raise ValueError(f"group {group.id} has {len(group.continuations)} continuations, the layout {layout.group}")
    if len(group.prompt) > layout.prompt or longest > layout.completion:
        raise ValueError(
            f"group {group.id}: prompt of {len(group.prompt)} and continuation of {longest} tokens do not fit "
            f"the layout's {layout.prompt} and {layout.completion}"
        )


def _image_runs(piece: Segment, group: Group, image_tokens: Callable[[str], int]) -> list[tuple[int, int, int]]:
    """(begin, end, image index) of each occurrence of an image in a segment."""
    runs = []
    begin = 0
    while begin < len(piece):
        index = int(piece.image[begin])
        if index < 0:
            begin += 1
            continue
        end = begin + image_tokens(group.images[index])
        if end == begin:
            raise ValueError(
                f"group {group.id}: image {group.images[index]} stands in the text, but images have no soft tokens "
                "here; give the model's feature store"
            )
        if end > len(piece) or not (piece.image[begin:end] == index).all():
            raise ValueError(
                f"group {group.id}: image {group.images[index]} needs {end - begin} soft tokens in one run, "
                f"found fewer at token {begin} of a segment of {len(piece)}"
            )
        runs.append((begin, end, index))
        begin = end
    return runs
