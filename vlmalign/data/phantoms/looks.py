"""How an institution's films look: tone curve, noise, sharpness, vignette, collimation border and text marker.

Images here are float32 [size, size], 0 black to 1 white.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

#: 5 x 7 dot letters for side markers and institution text.
_GLYPHS = {
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "P": "11110 10001 10001 11110 10000 10000 10000",
}


@dataclass(frozen=True)
class Look:
    """The appearance of an institution's films; no finding depends on it."""

    contrast: float = 1.0  #: slope about mid grey
    brightness: float = 0.0  #: added after contrast
    gamma: float = 1.0  #: > 1 darkens mid tones
    noise: float = 0.02  #: standard deviation of the grain
    blur: int = 0  #: passes of a 1-2-1 filter at 128 px (scaled with size)
    vignette: float = 0.0  #: darkening at the corners, 0..1
    border: float = 0.0  #: largest width of the collimation border, as a share of the film
    border_tone: float = 0.0  #: its grey value
    marker: str = ""  #: letters printed at the top, e.g. "L" or "AP"
    marker_left: bool = False  #: at the image's left edge, else at its right
    scale: float = 1.0  #: mean magnification of the chest


def apply_look(image: np.ndarray, look: Look, rng: np.random.Generator) -> np.ndarray:
    """`image` (float32 [size, size], 0..1) as this institution would print it: uint8 [size, size]."""
    size = image.shape[0]
    for _ in range(round(look.blur * size / 128)):
        image = _smooth(image)
    jitter = rng.uniform(-1.0, 1.0, size=3)
    image = (image - 0.5) * (look.contrast * (1 + 0.06 * jitter[0])) + (0.5 + look.brightness + 0.03 * jitter[1])
    if look.vignette:
        axis = np.linspace(-1, 1, size, dtype=np.float32) ** 2
        image -= (0.5 * look.vignette) * (axis[:, None] + axis[None, :]) * 0.5
    image += look.noise * rng.standard_normal(image.shape, dtype=np.float32)
    np.clip(image, 0, 1, out=image)
    if look.gamma != 1.0:
        image = image ** np.float32(look.gamma * (1 + 0.05 * jitter[2]))
    _collimate(image, look, rng)
    _print_marker(image, look, rng)
    return (image * 255 + 0.5).astype(np.uint8)


def _smooth(image: np.ndarray) -> np.ndarray:
    padded = np.pad(image, 1, mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 16)


def _collimate(image: np.ndarray, look: Look, rng: np.random.Generator) -> None:
    top, bottom, left, right = (rng.uniform(0, look.border, size=4) * image.shape[0]).astype(int)
    image[:top] = look.border_tone
    image[image.shape[0] - bottom :] = look.border_tone
    image[:, :left] = look.border_tone
    image[:, image.shape[0] - right :] = look.border_tone


def _print_marker(image: np.ndarray, look: Look, rng: np.random.Generator) -> None:
    if not look.marker:
        return
    size = image.shape[0]
    dots = np.concatenate(
        [np.pad(_bitmap(letter), ((0, 0), (0, 1))) for letter in look.marker], axis=1
    )  # [7, 6 x letters]
    dots = np.kron(dots, np.ones((max(1, size // 128),) * 2, dtype=bool))
    top = int(size * rng.uniform(0.02, 0.07))
    edge = int(size * rng.uniform(0.02, 0.06))
    left = edge if look.marker_left else size - edge - dots.shape[1]
    window = image[top : top + dots.shape[0], left : left + dots.shape[1]]
    window[dots] = 0.97


def _bitmap(letter: str) -> np.ndarray:
    return np.array([[dot == "1" for dot in row] for row in _GLYPHS[letter].split()])
