"""Films from which something was taken, to find out whether a model looks at them, and where.

Altered is the 8-bit film at the size that the tower takes, uint8 [height, width] or [height, width, 3]. What is taken away
becomes the film's mean grey (of each channel), which is all that is left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

from vlmalign.data.films.reading import TwoStepReader
from vlmalign.data.films.resize import load_film
from vlmalign.types import Grid, Patches

#: film -> film of the same shape, in memory of its own
Alteration = Callable[[np.ndarray], np.ndarray]


def blank(film: np.ndarray) -> np.ndarray:
    """The film's mean grey everywhere."""
    return cover(film, 0.0, 0.0, 1.0, 1.0)


def border(film: np.ndarray, width: float) -> np.ndarray:
    """The outer frame alone, `width` (a share of the shorter side, below 0.5) wide; the inside is blank."""
    height, length = film.shape[:2]
    pixels = max(1, round(width * min(height, length)))
    return cover(film, pixels / height, pixels / length, 1 - pixels / height, 1 - pixels / length)


def cover(film: np.ndarray, top: float, left: float, bottom: float, right: float) -> np.ndarray:
    """The film with the rectangle between these shares of its height and width covered."""
    height, length = film.shape[:2]
    altered = film.copy()
    rows = slice(round(top * height), round(bottom * height))
    altered[rows, round(left * length) : round(right * length)] = np.rint(film.mean(axis=(0, 1)))
    return altered


def other_patients(patients: Sequence[str], *, seed: int) -> np.ndarray:
    """For each film, the place of one of another patient, int [films].

    Patients stand in a circle, in an order that follows from `seed`, and each is shown films of the next: a derangement
    of patients. Who has more films than the next sees some of them twice.

    Raises:
        ValueError: for films of fewer than two patients.
    """
    names, owner = np.unique(np.asarray(patients, object).astype(str), return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"films can be exchanged between at least two patients, found {len(names)}; draw a larger set")
    circle = np.random.default_rng(seed).permutation(len(names))
    following = np.empty_like(circle)
    following[circle] = np.roll(circle, -1)
    places = [np.flatnonzero(owner == patient) for patient in range(len(names))]
    shown = np.empty(len(owner), int)
    for patient, own in enumerate(places):
        shown[own] = np.resize(places[following[patient]], len(own))
    return shown


class AlteredFilms:
    """A `PixelReader` of altered films. `meaning` tells of a key which film it is and what is done to it."""

    def __init__(self, reader: TwoStepReader, meaning: Callable[[str], tuple[str, Alteration]]):
        self._reader, self._meaning = reader, meaning
        # One film is often altered in many ways, one after the other.
        self._load = lru_cache(maxsize=1)(lambda path: load_film(path, reader.recipe(path), reader.cache))

    def grid(self, key: str) -> Grid:
        return self._reader.grid(self._meaning(key)[0])

    def read(self, keys: list[str]) -> list[np.ndarray | Patches]:
        return [self._reader.finish(alter(self._load(path))) for path, alter in map(self._meaning, keys)]


def alteration(name: str, *, width: float) -> Alteration | None:
    """What `blank` or `border` (of this width) does to a film; None for films that are shown as they are."""
    return {"blank": blank, "border": partial(border, width=width)}.get(name)
