"""A procedural chest phantom: a stylised frontal film drawn from a `Case`.

No patient data is needed to train and test on it, and every film's truth is known. The chest is made of cheap
analytic shapes on a fixed grid (a few ms per film at 128 px); findings are exaggerated, so that a small vision
tower can learn them. Film units are those of `cases`: x and y in -1..1, grey values 0 black to 1 white.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from vlmalign.data.phantoms.cases import KINDS, PREVALENCE, Case, Finding, draw_case
from vlmalign.data.phantoms.looks import Look, apply_look
from vlmalign.data.phantoms.painters import CHEST, MIDLINE, PAINTERS, Film, edge

__all__ = ["KINDS", "PREVALENCE", "Case", "Finding", "Look", "draw_case", "finding_boxes", "render", "render_lateral"]


#: grey values that a finding changes at its strongest, below which it has no box
HARDLY_SEEN = 0.05


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    axis = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    noise = np.random.default_rng(0)
    fields = []
    for _ in range(8):
        field = np.zeros((size, size), np.float32)
        for cells, weight in ((10, 0.5), (22, 0.5)):
            coarse = Image.fromarray(noise.standard_normal((cells, cells)).astype(np.float32))
            field += weight * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
        fields.append(field / np.abs(field).max() * 1.5)
    return axis[None, :], axis[:, None], np.stack(fields)


def render(case: Case, look: Look, rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """The frontal film of `case` as an institution with this `look` prints it: uint8 [size, size].

    `rng` draws the anatomy and the grain; the same case, look, generator state and size give the same bytes.
    """
    film = _draw_chest(case, rng, size, look.scale)
    for finding in case.findings:
        PAINTERS[finding.kind](film, finding)
    return apply_look(film.image, look, rng)


def finding_boxes(
    case: Case, look: Look, rng: np.random.Generator, size: int = 128
) -> list[tuple[float, float, float, float] | None]:
    """Where each finding of `case` stands on the film that `render` draws of the same arguments: left, top, width and
    height in shares of the film's sides, about what it changes by at least half as much as at its strongest; None for one
    that is hardly seen.
    """
    film = _draw_chest(case, rng, size, look.scale)
    found: list[tuple[float, float, float, float] | None] = []
    for finding in case.findings:
        before = film.image.copy()
        PAINTERS[finding.kind](film, finding)
        change = np.abs(film.image - before)
        if change.max() < HARDLY_SEEN:
            found.append(None)
            continue
        rows, columns = (np.flatnonzero((change >= change.max() / 2).any(axis=axis)) for axis in (1, 0))
        left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        found.append(tuple(float(each) / size for each in (left, top, right - left, bottom - top)))
    return found


def render_lateral(look: Look, rng: np.random.Generator, size: int = 128) -> np.ndarray:
    """A featureless lateral film, uint8 [size, size]: data sets hold such rows, and readers leave them out."""
    x, y, _ = _grid(size)
    image = 0.6 * edge(0.75 - np.abs(x + 0.1 * y), 0.05) * np.ones_like(y)
    lung = edge(1 - (x / 0.55) ** 2 - ((y + 0.05) / 0.65) ** 2, 0.2)
    image += lung * (0.25 - image)
    return apply_look(image.astype(np.float32), look, rng)


def _draw_chest(case: Case, rng: np.random.Generator, size: int, scale: float) -> Film:
    """A chest without placed findings: air, soft tissue, lungs, ribs, heart, mediastinum, diaphragm, clavicles."""
    x, y, fields = _grid(size)
    zoom = np.float32(1 / (scale * rng.uniform(0.96, 1.04)))
    x = x * zoom + np.float32(rng.uniform(-0.04, 0.04))
    y = y * zoom + np.float32(rng.uniform(-0.04, 0.04))
    texture = fields[rng.integers(len(fields))]
    shift = rng.integers(size, size=2)
    texture = np.roll(texture, tuple(shift), axis=(0, 1))
    off = np.abs(x - MIDLINE)  # [1, size]: distance from the midline

    # Chest wall and diaphragm: an arch, and a dome on each side (the patient's right one higher).
    flat = 0.10 if case.has("emphysema") else 0.0
    base = rng.uniform(0.54, 0.60) + flat
    wall = CHEST * np.sqrt(np.clip(1 - ((0.42 - y) / 1.20) ** 2, 0, 1))
    wall = np.where(y > 0.42, np.float32(CHEST), wall)
    arch = (0.16 - flat) * (1 - ((off - 0.38) / 0.40) ** 2)
    dome = base - arch + np.where(x < MIDLINE, np.float32(-0.05), np.float32(0.0))

    body = edge(0.94 - 0.28 * np.clip(-0.62 - y, 0, 1) * 2.2 - np.abs(x), 0.05)
    image = np.float32(0.04) + body * (0.58 + 0.10 * edge(y - dome, 0.08))
    lungs = edge(wall - off, 0.035) * edge(dome - y, 0.03) * edge(off - 0.11, 0.03)
    image += lungs * (0.22 - image)
    film = Film(image, lungs, x, y, wall, dome, texture, rng)

    # Vessels fan out from the hila; ribs run over lungs and wall.
    fan = np.exp(-(((off - 0.2) / 0.34) ** 2)) * np.exp(-(((y - 0.02) / 0.42) ** 2))
    image += lungs * fan * (0.08 + 0.07 * texture)
    phase = (y - 0.30 * off**2) * (2 * np.pi / rng.uniform(0.165, 0.185)) + rng.uniform(0, 2 * np.pi)
    image += 0.10 * np.clip(np.cos(phase) - 0.25, 0, 1) * edge(CHEST + 0.04 - off, 0.05) * edge(dome - y, 0.1) * body

    # Mediastinum widens at the arch when asked to; the spine shows through as a faint column.
    width = case.mediastinum * CHEST * (0.55 + 0.45 * np.exp(-(((y + 0.30) / 0.24) ** 2)))
    core = edge(width - off, 0.05)
    film.paint(core * edge(y + 0.95, 0.2) * edge(0.62 - y, 0.2), 0.80)
    film.paint(edge(0.035 - off, 0.03) * edge(-0.42 - y, 0.1) * 0.35, 0.35)
    half = case.heart * CHEST
    centre = MIDLINE + 0.30 * half
    tall = 0.27 + 0.25 * half
    inside = 1 - ((x - centre) / half) ** 2 - ((y - 0.32) / tall) ** 2
    heart = edge(inside, 0.18)
    film.paint(heart * edge(base + 0.15 - y, 0.2), 0.78)
    # From here on `lungs` is what shows of them: findings do not shine through the heart and the mediastinum.
    film.lungs *= (1 - heart) * (1 - core)

    slope = rng.uniform(0.10, 0.22)
    bone = edge(0.030 - np.abs(y + 0.60 + slope * (off - 0.35)), 0.02) * edge(0.74 - off, 0.05) * edge(off - 0.08, 0.05)
    film.paint(0.55 * bone, 0.90)
    return film
