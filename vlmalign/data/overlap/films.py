"""When two films are the same picture: the SHA-256 of the file, and a difference hash for re-encoded copies.

The difference hash says of each cell of a coarse grid whether its right and its lower neighbour are lighter:

    bit = cell[y, x + 1] - cell[y, x] > 0.02      and      bit = cell[y + 1, x] - cell[y, x] > 0.02      (grey levels)

It survives whatever keeps the order of neighbouring greys: re-encoding, another format or bit depth, resizing, contrast
and brightness, inversion (all bits flip). It does not find cropped, padded, rotated or mirrored copies.

Measured: bits of 1,152 that differ, as median / 99th percentile / largest of n films against their own copies, and the
nearest of all pairs of different films (number of pairs). `NEAR` lies between the two.

    ======================= ===================== ===================== ===================== =====================
    films (n)               NIH, 512 px (300)     NIH, 64 px (1,000)    phantoms, 256 px      phantoms, 128 px
                                                                        (200)                 (600)
    ======================= ===================== ===================== ===================== =====================
    JPEG, quality 95        2 / 6 / 9             10 / 25 / 31          10 / 21 / 24          7 / 15 / 17
    JPEG, quality 75        7 / 17 / 25           38 / 69 / 86          24 / 40 / 45          28 / 46 / 51
    JPEG, quality 60        10 / 24 / 38          54 / 103 / 126        36 / 54 / 65          45 / 64 / 70
    half the size           5 / 13 / 19           21 / 39 / 52          14 / 25 / 26          11 / 21 / 25
    half, JPEG 75           11 / 28 / 36          128 / 184 / 221       41 / 56 / 65          67 / 97 / 103
    inverted, JPEG 95       3 / 20 / 80           10 / 30 / 57          11 / 22 / 23          7 / 16 / 19
    RGB or 16-bit PNG       4 / 11 / 15           0 / 0 / 0             12 / 22 / 24          0 / 0 / 0
    nearest, other patients 222 (44,781)          196 (491,169)         165 (19,753)          163 (179,291)
    nearest, same patient   196 (69)              119 (8,331)           221 (147)             244 (409)
    ======================= ===================== ===================== ===================== =====================

So every copy that has 128 px itself is found down to quality 60; at 64 px and quality 60, 13 of 1,000 are missed; at 32 px
a JPEG has too few pixels. The nearest follow-ups are two films of one patient taken alike; at 64 px they come close, and
phantoms' lateral films, which are smooth, do at 512 px (126 in 79 films). With 8 x 8 cells other patients came nearer
than copies; with 16 x 16 the gap was narrower. Between the two NIH folders the three films that both hold are found, and
nothing else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlmalign.data.films.images import decode_image, read_film

SIDE = 24  #: cells of the grid whose neighbours are compared, along each side
BITS = 2 * SIDE * SIDE
#: Two films are copies of each other when at most so many bits differ (or, of inverted copies, agree).
NEAR = 100
#: Grey levels that a neighbour must be lighter by: far below what can be seen, far above the rounding of a flat area.
STEP = 0.02
#: Rows compared at once: the differences of 128 x 2,000 films stay in a core's cache.
BLOCK = 128


class FilmMark(NamedTuple):
    """What is kept of a film to know it again."""

    sha256: str  #: of the file's bytes, hexadecimal
    dhash: str  #: BITS bits, hexadecimal; "" for a film of one grey, which is no copy of another for being blank too


def marks_of_film(path: Path, *, bits: int = 16) -> FilmMark:
    """The mark of the film at `path`; `bits` of a 16-bit source as in `films.images.load_image`.

    Raises:
        FileNotFoundError, BadImage: as `films.images.load_image` does.
    """
    data = read_film(path)
    # A JPEG may be decoded at a fraction of its size, as long as several pixels remain to each cell.
    film = decode_image(data, path, 4 * (SIDE + 1), bits=bits).convert("L")
    return FilmMark(hashlib.sha256(data).hexdigest(), difference_hash(film))


def difference_hash(film: Image.Image) -> str:
    """The difference hash of a grey film, hexadecimal; "" where the whole grid spans less than one grey level."""
    # In floating point: with 8-bit cells the smooth films of phantoms would tie in half of all places, and look alike.
    grid = (SIDE + 1, SIDE + 1)
    cells = np.asarray(film.convert("F").resize(grid, Image.Resampling.LANCZOS))
    if np.ptp(cells) < 1:
        return ""
    inner = cells[:-1, :-1]
    lighter = np.stack([cells[:-1, 1:] - inner > STEP, cells[1:, :-1] - inner > STEP])
    return np.packbits(lighter).tobytes().hex()


def near_films(training: Sequence[FilmMark], evaluation: Sequence[FilmMark]) -> list[tuple[int, int]]:
    """(index in training, index in evaluation) of films that look the same but are not the same file.

    Each film with a copy in the other set is listed with its nearest one, not with all of them.
    """
    codes: dict[str, int] = {}
    ours, theirs = _Hashes(training, codes), _Hashes(evaluation, codes)
    if not len(ours.rows) or not len(theirs.rows):
        return []
    pairs = set()
    nearest = np.zeros(len(theirs.rows), int)  # in ours, of each of theirs
    least = np.full(len(theirs.rows), BITS)
    for start in range(0, len(ours.rows), BLOCK):
        block = slice(start, start + BLOCK)
        distances = hash_distances(ours.words[block], theirs.words)
        distances[ours.file[block, None] == theirs.file] = BITS
        found = np.flatnonzero(distances.min(axis=1) <= NEAR)
        pairs.update(zip(found + start, distances[found].argmin(axis=1), strict=True))
        lowest = distances.min(axis=0)
        nearest = np.where(lowest < least, start + distances.argmin(axis=0), nearest)
        least = np.minimum(lowest, least)
    found = np.flatnonzero(least <= NEAR)
    pairs.update(zip(nearest[found], found, strict=True))
    return sorted((int(ours.rows[i]), int(theirs.rows[j])) for i, j in pairs)


def hash_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """How many bits differ, or agree if those are fewer: uint16 [n, m] of uint64 [n, words] and [m, words]."""
    differ = np.zeros((len(left), len(right)), np.uint16)
    for word in range(left.shape[1]):
        differ += np.bitwise_count(left[:, None, word] ^ right[None, :, word])
    return np.minimum(differ, BITS - differ)


class _Hashes:
    """The films of a set that have a difference hash: their rows in the set, 64-bit words, and a number per file."""

    def __init__(self, marks: Sequence[FilmMark], codes: dict[str, int]) -> None:
        self.rows = np.array([row for row, mark in enumerate(marks) if mark.dhash], int)
        packed = bytes.fromhex("".join(marks[row].dhash for row in self.rows))
        self.words = np.frombuffer(packed, np.uint64).reshape(len(self.rows), BITS // 64)
        self.file = np.array([codes.setdefault(marks[row].sha256, len(codes)) for row in self.rows], int)
