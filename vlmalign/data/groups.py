"""Groups of tokens -> rectangular batches. A batch has a static layout (P; K x C): few shapes, few compilations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from vlmalign.types import Grid, Group, GroupBatch, Layout, Segment


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
    grid: Callable[[str], Grid] | None,
    position_axes: int = 1,
) -> tuple[GroupBatch, list[str]]:
    """One row per group, padded to `rows`; returns the batch and its distinct images in the order of `features`.

    `grid(key)` says how the soft tokens of an image lie (None: no group holds an image). In the batch, `image` points
    into the features of the returned images laid end to end. With three `position_axes`, positions are (time, row,
    column): see `rotary_positions`.

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
            total += 0 if grid is None else grid(key).tokens
    shape = (rows, layout.row)
    tokens, order = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    segment, image, block = (np.full(shape, -1, np.int32) for _ in range(3))
    position = np.zeros(shape if position_axes == 1 else (*shape, position_axes), np.int32)
    weight = np.zeros((rows, layout.group, layout.completion), np.float32)
    group_id = np.full((rows,), -1, np.int32)
    for row, group in enumerate(groups):
        _check(group, layout)
        group_id[row] = group.id
        blocks, next_position = 0, 0
        pieces = [(0, 0, 0, group.prompt)]
        for k, continuation in enumerate(group.continuations):
            pieces.append((layout.prompt + k * layout.completion, k + 1, len(group.prompt), continuation))
            weight[row, k, : len(continuation)] = continuation.weight
        for column, number, first, piece in pieces:
            span = slice(column, column + len(piece))
            tokens[row, span] = piece.tokens
            segment[row, span] = number
            order[row, span] = first + np.arange(len(piece))
            runs = _image_runs(piece, group, grid)
            for run in runs:
                at = slice(column + run.begin, column + run.end)
                image[row, at] = start[run.key] + np.arange(run.end - run.begin)
                block[row, at] = blocks
                blocks += 1
            if position_axes == 1:
                position[row, span] = order[row, span]
                continue
            position[row, span], after = rotary_positions(len(piece), runs, next_position)
            if number == 0:
                # Every continuation starts where the prompt ends, which is not the prompt's length.
                next_position = after
    batch = GroupBatch(
        tokens=tokens,
        segment=segment,
        order=order,
        position=position,
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


class ImageRun(NamedTuple):
    """One occurrence of an image in a segment: tokens `begin` up to `end`."""

    begin: int
    end: int
    key: str
    grid: Grid


def rotary_positions(length: int, runs: Sequence[ImageRun], first: int) -> tuple[np.ndarray, int]:
    """M-RoPE positions [length, 3] of a segment that starts at `first`, and the position after it.

    Text at p is (p, p, p); soft token (r, c) of an image that begins at p is (p, p + r, p + c), and the token after
    the image stands at p + max(rows, columns) (Qwen2-VL, arXiv 2409.12191, section 2.1).

    >>> positions, after = rotary_positions(5, [ImageRun(1, 4, "film", Grid(1, 3))], 7)
    >>> positions.tolist(), after
    ([[7, 7, 7], [8, 8, 8], [8, 8, 9], [8, 8, 10], [11, 11, 11]], 12)
    """
    position = np.zeros((length, 3), np.int32)
    at = 0
    for run in [*runs, None]:
        until = length if run is None else run.begin
        position[at:until] = (first + np.arange(until - at))[:, None]
        first += until - at
        if run is not None:
            r, c = np.divmod(np.arange(run.grid.tokens), run.grid.columns)
            position[run.begin : run.end] = first + np.stack([np.zeros_like(r), r, c], axis=1)
            first += max(run.grid.rows, run.grid.columns)
            at = run.end
    return position, first


def _image_runs(piece: Segment, group: Group, grid: Callable[[str], Grid] | None) -> list[ImageRun]:
    runs = []
    begin = 0
    while begin < len(piece):
        index = int(piece.image[begin])
        if index < 0:
            begin += 1
            continue
        key = group.images[index]
        if grid is None:
            raise ValueError(
                f"group {group.id}: image {key} stands in the text, but images have no soft tokens here; "
                "give the model's feature store"
            )
        lies = grid(key)
        end = begin + lies.tokens
        if end > len(piece) or not (piece.image[begin:end] == index).all():
            raise ValueError(
                f"group {group.id}: image {key} needs {lies.tokens} soft tokens in one run, "
                f"found fewer at token {begin} of a segment of {len(piece)}"
            )
        runs.append(ImageRun(begin, end, key, lies))
        begin = end
    return runs
