"""Random groups for a configuration: mixed lengths, several images at different places, some shown twice or on end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from configurations import Rng, between, chance, pick

from vlmalign.models.config import ModelConfig, SiglipConfig
from vlmalign.models.towers import Picture
from vlmalign.types import Grid, Group, Layout, Patches, Segment


@dataclass(frozen=True)
class Pictures:
    """The images of a draw, by key; what `FeatureStore` asks for them."""

    grids: dict[str, Grid]
    pictures: dict[str, Picture]

    def grid(self, key: str) -> Grid:
        return self.grids[key]

    def read(self, keys: list[str]) -> list[Picture]:
        return [self.pictures[key] for key in keys]


@dataclass(frozen=True)
class Prompts:
    """Groups with at least one continuation each, the layout that holds them, and their images (None: text)."""

    groups: tuple[Group, ...]
    layout: Layout
    images: Pictures | None

    def occurrences(self, *segments: Segment, group: Group) -> list[str]:
        """The keys of images in the order in which these segments show them."""
        found = []
        for segment in segments:
            at = 0
            while at < len(segment):
                if segment.image[at] < 0:
                    at += 1
                    continue
                found.append(group.images[segment.image[at]])
                at += self.images.grid(found[-1]).tokens
        return found


def draw_pictures(rng: Rng, config: ModelConfig) -> Pictures:
    """One to three images; of different sizes where the tower takes them, the first one large enough for two windows."""
    vision, grids, pictures = config.vision, {}, {}
    for key in ("a", "b", "c")[: between(rng, 1, 3)]:
        if isinstance(vision, SiglipConfig):
            side = round(vision.tokens**0.5)
            grids[key] = Grid(side, side)
            pictures[key] = rng.normal(size=(vision.channels, *(vision.image_size,) * 2)).astype(np.float32)
        else:
            grid = Grid(between(rng, 1, 4), between(rng, 1, 4))
            if key == "a":
                grid = pick(rng, Grid(1, vision.window + 1), Grid(vision.window + 1, 2))
            rows, columns = grid.rows * vision.merge, grid.columns * vision.merge
            values = rng.normal(size=(rows * columns, vision.patch_size)).astype(np.float32)
            grids[key], pictures[key] = grid, Patches(values, rows, columns)
    return Pictures(grids, pictures)


def draw_prompts(rng: Rng, config: ModelConfig) -> Prompts:
    """Two or three groups of one to three continuations; the first prompt of a vision model shows an image."""
    special = config.image_tokens
    text_ids = config.decoder.vocab - (0 if special is None else 4)
    images = None if special is None else draw_pictures(rng, config)

    def text(low: int, high: int) -> list[int]:
        return rng.integers(1, text_ids, size=between(rng, low, high)).tolist()

    def shown(count: int) -> list[Any]:
        """Images with text before, between and after them, or with none."""
        parts: list[Any] = text(0, 4)
        for _ in range(count):
            parts += [pick(rng, *images.grids), *text(0, 3)]
        return parts

    def segment(parts: list[Any], keys: tuple[str, ...]) -> Segment:
        tokens, image = [], []
        for part in parts:
            if isinstance(part, str):
                soft = images.grid(part).tokens
                tokens += [special.begin, *[special.soft] * soft, special.end]
                image += [-1, *[keys.index(part)] * soft, -1]
            else:
                tokens.append(part)
                image.append(-1)
        # A placeholder is never a label; its id may lie beyond the vocabulary.
        return Segment(
            np.asarray(tokens, np.int32), np.asarray(image, np.int32), (np.asarray(image) < 0).astype(np.float32)
        )

    groups, count = [], between(rng, 1, 3)
    for number in range(between(rng, 2, 3)):
        prompt = text(1, 22)
        if images is not None and (number == 0 or chance(rng, 0.6)):
            prompt = text(1, 5) + shown(between(rng, 1, 3))
        pieces = [text(1, 6) for _ in range(count)]
        if images is not None and chance(rng, 0.3):
            pieces[-1] = [*text(1, 2), *shown(1), *text(1, 2)]
        keys = tuple(dict.fromkeys(part for piece in (prompt, *pieces) for part in piece if isinstance(part, str)))
        groups.append(Group(number, segment(prompt, keys), tuple(segment(piece, keys) for piece in pieces), keys))
    longest = max(len(c) for g in groups for c in g.continuations)
    width = max(len(g.prompt) for g in groups) + between(rng, 0, 3)
    return Prompts(tuple(groups), Layout(width, count, longest + between(rng, 0, 2)), images)
