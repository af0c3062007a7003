"""The strokes of the phantom: one painter per kind of finding, over a film that holds the anatomy they need.

Film units: x and y in -1..1, grey values 0 black to 1 white. Findings are exaggerated on purpose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlmalign.data.phantoms.cases import Finding

MIDLINE = 0.02
CHEST = 0.80  #: half the inner width of the chest


@dataclass
class Film:
    """The film being drawn, with the anatomy the painters need. x is a row, y a column: shapes broadcast."""

    image: np.ndarray  #: [size, size]
    lungs: np.ndarray  #: [size, size], 1 inside either lung
    x: np.ndarray  #: [1, size]
    y: np.ndarray  #: [size, 1]
    wall: np.ndarray  #: [size, 1]: distance of the inner chest wall from the midline
    dome: np.ndarray  #: [1, size]: height of the diaphragm
    texture: np.ndarray  #: [size, size]: smooth noise, mean 0, about -1..1
    rng: np.random.Generator

    def side(self, name: str) -> np.ndarray:
        """[1, size]: 1 on the patient's named side; 1 everywhere for "both"."""
        if name == "both":
            return np.ones_like(self.x)
        return ((self.x < MIDLINE) if name == "right" else (self.x >= MIDLINE)).astype(np.float32)

    def paint(self, alpha: np.ndarray, tone: float | np.ndarray) -> None:
        """Blend the film towards `tone` by `alpha` in 0..1."""
        self.image += alpha * (tone - self.image)

    def bump(self, x: float, y: float, width: float, height: float) -> np.ndarray:
        """A separable Gaussian hill of height 1: [size, size]."""
        return np.exp(-(((self.y - y) / height) ** 2)) * np.exp(-(((self.x - x) / width) ** 2))

    def stroke(self, x0: float, y0: float, x1: float, y1: float, half_width: float) -> np.ndarray:
        """A straight stroke with round ends, 1 inside: [size, size]."""
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((self.x - x0) * dx + (self.y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        distance = np.sqrt((self.x - x0 - along * dx) ** 2 + (self.y - y0 - along * dy) ** 2)
        return edge(half_width - distance, 0.02)


def edge(depth: np.ndarray, softness: float) -> np.ndarray:
    """1 where `depth` is well above 0, 0 well below, a ramp of width `softness` between."""
    return np.clip(depth * (1 / softness) + 0.5, 0, 1)


def _emphysema(film: Film, finding: Finding) -> None:
    """size: strength. Dark lungs (and, in the chest itself, flat domes)."""
    film.paint(film.lungs * (0.62 * finding.size), 0.06)


def _fibrosis(film: Film, finding: Finding) -> None:
    """size: strength. A fine net in the outer lower lungs."""
    net = np.maximum(np.cos((film.x + film.y) * 58), np.cos((film.x - film.y) * 58))
    outer = edge(np.abs(film.x - MIDLINE) - 0.35, 0.3) * edge(film.y - 0.02, 0.3)
    film.image += film.lungs * outer * (0.30 * finding.size) * np.clip(net, 0, 1)


def _edema(film: Film, finding: Finding) -> None:
    """size: strength. Haze about both hila, shaped as a pair of wings."""
    wings = film.bump(-0.30, 0.0, 0.24, 0.36) + film.bump(0.34, 0.0, 0.24, 0.36)
    film.paint(film.lungs * wings * finding.size * (1 + 0.25 * film.texture), 0.80)


def _opacity(film: Film, finding: Finding) -> None:
    """size: radius. One soft, ill-defined haze."""
    hill = film.bump(finding.x, finding.y, finding.size * 1.1, finding.size)
    film.paint(film.lungs * hill * 0.55, 0.70)


def _pneumonia(film: Film, finding: Finding) -> None:
    """size: reach. A cluster of bright patches."""
    angles = film.rng.uniform(0, 1) * 2 * np.pi + np.arange(6) * (2 * np.pi / 6)
    reach = finding.size * film.rng.uniform(0.55, 1.0, size=6)
    cx, cy = finding.x + reach * np.cos(angles), finding.y + reach * np.sin(angles)
    radius = film.rng.uniform(0.045, 0.065, size=6)
    columns = np.exp(-(((film.y - cy) / radius) ** 2)).astype(np.float32)  # [size, 6]
    rows = np.exp(-(((film.x.T - cx) / radius) ** 2)).astype(np.float32)  # [size, 6]
    film.paint(film.lungs * np.clip(1.2 * (columns @ rows.T), 0, 0.85), 0.85)


def _consolidation(film: Film, finding: Finding) -> None:
    """size: half height. A dense block across the lung, with straight borders."""
    block = edge(finding.size - np.abs(film.y - finding.y), 0.04) * film.side(finding.side)
    film.paint(film.lungs * block * 0.92, 0.74)


def _lesion(film: Film, finding: Finding) -> None:
    """size: radius. A bright disc."""
    distance = np.sqrt((film.x - finding.x) ** 2 + (film.y - finding.y) ** 2)
    film.paint(edge(finding.size - distance, 0.03) * 0.95, 0.88)


def _atelectasis(film: Film, finding: Finding) -> None:
    """size: half thickness. A bright plate, lying nearly flat."""
    tilt = -0.25 if finding.side == "right" else 0.25
    lateral = film.x - finding.x
    plate = edge(finding.size - np.abs(film.y - finding.y - tilt * lateral), 0.02)
    film.paint(film.lungs * plate * edge(0.27 - np.abs(lateral), 0.04) * 0.95, 0.92)


def _pneumothorax(film: Film, finding: Finding) -> None:
    """size: width of the gap. A black, empty crescent at the apex, edged by a fine bright line."""
    off = np.abs(film.x - MIDLINE)
    gap = finding.size * np.clip(0.55 - film.y, 0, 1.2)  # [size, 1]: widest at the apex
    retreat = film.wall - gap - off  # > 0 inside the collapsed lung
    side = film.side(finding.side)
    fallen = np.maximum(edge(-retreat, 0.03), edge(finding.size * 0.9 - 0.76 + 0.4 * off - film.y, 0.03))
    film.paint(film.lungs * side * fallen * 0.97, 0.01)
    film.paint(film.lungs * side * edge(0.018 - np.abs(retreat), 0.02) * edge(0.25 - film.y, 0.05) * 0.8, 0.80)


def _effusion(film: Film, finding: Finding) -> None:
    """size: depth of the fluid above the base. Bright below a meniscus that climbs the chest wall."""
    off = np.abs(film.x - MIDLINE)
    surface = 0.56 - finding.size - 0.20 * np.clip((off - 0.35) / 0.45, 0, 1) ** 2
    fluid = edge(film.y - surface, 0.05) * edge(film.wall - off, 0.035) * edge(0.66 - film.y, 0.1)
    film.paint(fluid * film.side(finding.side) * edge(off - 0.09, 0.05) * 0.95, 0.82)


def _rind(film: Film, finding: Finding) -> None:
    """size: thickness. A bright, wavy layer along the outer chest wall."""
    depth = film.wall - np.abs(film.x - MIDLINE)
    wave = finding.size * (1 + 0.25 * np.cos(film.y * 19))
    film.paint(film.lungs * film.side(finding.side) * edge(wave - depth, 0.025) * 0.95, 0.93)


def _hernia(film: Film, finding: Finding) -> None:
    """size: radius. An air bubble with a bright rim over the lower heart."""
    distance = np.sqrt((film.x - 0.06) ** 2 + (film.y - 0.36) ** 2)
    film.paint(edge(finding.size - distance, 0.03), 0.18)
    film.paint(edge(0.025 - np.abs(distance - finding.size), 0.02), 0.97)


def _fracture(film: Film, finding: Finding) -> None:
    """size: length of each half. A rib broken into two ends that no longer meet."""
    outward = -1.0 if finding.side == "right" else 1.0
    x, y = finding.x + 0.08 * outward, finding.y
    inner = film.stroke(x - outward * (finding.size + 0.04), y - 0.13, x - outward * 0.04, y - 0.06, 0.034)
    outer = film.stroke(x + outward * 0.04, y + 0.10, x + outward * (finding.size + 0.0), y + 0.20, 0.034)
    film.paint(film.bump(x, y + 0.02, 0.06, 0.12) * 0.8, 0.05)
    film.paint(np.maximum(inner, outer), 0.97)


def _device(film: Film, finding: Finding) -> None:
    """style: a central line, a pacemaker with its lead, or a tube in the windpipe."""
    if finding.style == "tube":
        film.paint(film.stroke(MIDLINE, -1.0, MIDLINE + 0.01, -0.18, 0.030), 1.0)
        return
    outward = -1.0 if finding.side == "right" else 1.0
    tip = film.rng.uniform(0.0, 0.2)
    if finding.style == "line":
        film.paint(film.stroke(outward * 0.62, -0.80, -0.08, -0.42, 0.022), 1.0)
        film.paint(film.stroke(-0.08, -0.42, -0.07, tip, 0.022), 1.0)
        return
    box = edge(0.13 - np.abs(film.x - outward * 0.56), 0.02) * edge(0.11 - np.abs(film.y + 0.55), 0.02)
    film.paint(box, 1.0)
    film.paint(film.stroke(outward * 0.45, -0.50, -0.02, -0.36, 0.018), 1.0)
    film.paint(film.stroke(-0.02, -0.36, 0.12, 0.25 + tip, 0.018), 1.0)


PAINTERS = {
    "emphysema": _emphysema,
    "fibrosis": _fibrosis,
    "edema": _edema,
    "opacity": _opacity,
    "pneumonia": _pneumonia,
    "consolidation": _consolidation,
    "lesion": _lesion,
    "atelectasis": _atelectasis,
    "pneumothorax": _pneumothorax,
    "effusion": _effusion,
    "rind": _rind,
    "hernia": _hernia,
    "fracture": _fracture,
    "device": _device,
}
