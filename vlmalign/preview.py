"""One conversation as it will be trained on: what the model reads, where images stand, and which tokens are labels.

The text is decoded from the very tokens that training sees, so a template's surprises show. It prints what the file
holds, patients' text included, because that was asked for; nothing is written down.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from vlmalign.data.chat.chat import Chat, open_chat
from vlmalign.data.chat.messages import image_keys
from vlmalign.data.chat.preferences import preference_group
from vlmalign.data.films.images import BadImage
from vlmalign.data.films.pixels import image_size, open_pixels
from vlmalign.data.sources.rows import read_row
from vlmalign.data.sources.stored_images import StoredImages
from vlmalign.models.config import ModelConfig
from vlmalign.reporting.visible_text import plain
from vlmalign.types import Example, Grid, Group, Segment
from vlmalign.weights.checkpoint import load_config

READ, LABEL, STOP, IMAGE = "dim", "bold green", "bold reverse green", "cyan"


class Run(NamedTuple):
    """Tokens `start` up to `end` of a segment that are shown alike."""

    start: int
    end: int
    image: int  #: index of the image whose soft tokens they are, or -1
    weight: float


def preview(checkpoint: Path, messages: Path, *, row: int = 1, color: bool = True, images: Path | None = None) -> None:
    """Prints line `row` of a file of rows as the chat side of a checkpoint folder prepares it: a conversation, a prompt, or
    both answers of a preference. Images lie below `images`, by default beside the file.

    Raises:
        ValueError: when the folder, the row or one of its images cannot be used, naming it.
    """
    config = load_config(checkpoint)
    with tempfile.TemporaryDirectory(prefix="vlmalign-preview-") as cache:  # for images that a table holds as bytes
        _preview(
            checkpoint,
            config,
            read_row(messages, row, StoredImages(images or messages.parent, Path(cache))),
            row,
            color,
        )


def _preview(checkpoint: Path, config: ModelConfig, found: Example, row: int, color: bool) -> None:
    if "chosen" in found.meta:
        messages = [*found.meta["prompt"], *found.meta["chosen"], *found.meta["rejected"]]
    elif "messages" in found.meta:
        messages = found.meta["messages"]
    else:
        raise ValueError(
            f'{found.id}: expected "messages", "prompt" or "chosen" and "rejected"; a task asks about a record'
        )
    if config.vision is None:
        grid = None
    else:
        grid = open_pixels(checkpoint, family=config.family, image_tokens=config.vision.tokens).grid
    for key in image_keys(messages):
        try:
            image_size(key)  # towers of fixed size would not look at the file until it is trained on
        except (FileNotFoundError, BadImage) as error:
            raise ValueError(f"{found.id}: {error}") from error
    chat = open_chat(
        checkpoint,
        family=config.family,
        image_tokens=None if grid is None else lambda key: grid(key).tokens,
        vocab=config.decoder.vocab,
    )
    if "chosen" in found.meta:
        group = preference_group(found.meta, chat, group_id=row)
    elif messages[-1]["role"] == "assistant":
        group = chat.example(messages, group_id=row, name=found.id)
    else:
        group = chat.prompt(messages, group_id=row, name=found.id)
    # No wrapping by rich, so that what is copied from the terminal or piped is the text itself.
    console = Console(color_system="auto" if color else None, highlight=False, soft_wrap=True)
    console.print(render(chat, group, grid=grid))


def render(chat: Chat, group: Group, *, grid: Callable[[str], Grid] | None) -> Text:
    """The group's text with labels between « and », images in brackets, counts and a legend below.

    Without colours it says the same. `grid` tells how the soft tokens of an image lie (None: no images).
    """
    text = Text()
    _segment(text, chat, group.prompt, group.images, grid, answers=False)
    for k, continuation in enumerate(group.continuations):
        if len(group.continuations) > 1:
            text.append(f"\n--- continuation {k + 1} of {len(group.continuations)}\n", style=READ)
        _segment(text, chat, continuation, group.images, grid, answers=True)
    text.append("\n\n")
    for name, value in _counts(group):
        text.append(f"{name:<21}{value}\n")
    text.append("«")
    text.append("label", style=LABEL)
    text.append("» trained on, its stop token last (xW: with loss weight W)   ")
    text.append("text", style=READ)
    text.append(" read only   ")
    text.append("[image]", style=IMAGE)
    text.append(" soft tokens")
    return text


def _segment(
    text: Text,
    chat: Chat,
    segment: Segment,
    images: tuple[str, ...],
    grid: Callable[[str], Grid] | None,
    *,
    answers: bool,
) -> None:
    for run in _runs(segment):
        if run.image >= 0:
            assert grid is not None, "a group with images comes from a chat with images"
            for lies in _occurrences(run, grid(images[run.image])):
                name = plain(Path(images[run.image]).name)
                text.append(f"[image {name} {lies.rows}x{lies.columns} = {lies.tokens} tokens]", style=IMAGE)
        elif run.weight > 0 and answers:
            tokens = segment.tokens[run.start : run.end]
            stop = int(tokens[-1] in chat.stop_ids)
            text.append("«")
            text.append(_decode(chat, tokens[: len(tokens) - stop]), style=LABEL)
            text.append(_decode(chat, tokens[len(tokens) - stop :]), style=STOP)
            text.append("»" if run.weight == 1 else f"»x{run.weight:g}")
        else:
            text.append(_decode(chat, segment.tokens[run.start : run.end]), style=READ)


def _runs(segment: Segment) -> Iterator[Run]:
    edges = np.flatnonzero((np.diff(segment.image) != 0) | (np.diff(segment.weight) != 0)) + 1
    starts = [0, *edges.tolist(), len(segment)]
    for start, end in pairwise(starts):
        yield Run(start, end, int(segment.image[start]), float(segment.weight[start]))


def _occurrences(run: Run, lies: Grid) -> list[Grid]:
    """One grid per occurrence: the same image twice with nothing between is one run."""
    times, left = divmod(run.end - run.start, lies.tokens)
    assert not left, "an image has all its soft tokens"
    return [lies] * times


def _counts(group: Group) -> list[tuple[str, str]]:
    pieces = (group.prompt, *group.continuations)
    if not group.continuations:
        image = int((group.prompt.image >= 0).sum())
        return [
            ("prompt tokens", f"{len(group.prompt)}, and an answer is sampled"),
            ("image tokens", f"{image}; distinct images: {len(group.images)}"),
        ]
    soft = [int((piece.image >= 0).sum()) for piece in pieces]
    labels = [piece.weight[piece.weight > 0] for piece in group.continuations]
    weights = sorted({float(w) for part in labels for w in part})
    return [
        ("prompt tokens", str(len(group.prompt))),
        ("continuation tokens", " + ".join(str(len(piece)) for piece in group.continuations)),
        ("image tokens", f"{sum(soft)} ({soft[0]} in the prompt); distinct images: {len(group.images)}"),
        ("label tokens", " + ".join(str(len(part)) for part in labels)),
        ("loss weights", ", ".join(f"{w:g}" for w in weights) + f" (sum {sum(float(p.sum()) for p in labels):g})"),
    ]


def _decode(chat: Chat, tokens: np.ndarray) -> str:
    text = chat.tokenizer.decode(tokens.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return plain(text)  # a text must neither steer the terminal nor hide from its reader
