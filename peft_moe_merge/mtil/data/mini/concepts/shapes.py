"""Plane shapes in a random colour."""

import functools

import numpy as np

from ..canvas import Canvas, Concept, Point

_COLOURS = ("red", "blue", "green", "yellow", "orange", "purple", "pink", "brown", "white", "light blue")


def regular(corners: int, inner: float = 1.0, turn: float = 0.0) -> list[Point]:
    """A regular polygon of radius 1 with a corner on top; with `inner` < 1, a star whose dents lie at that radius."""
    steps = corners if inner == 1.0 else 2 * corners
    angles = -np.pi / 2 + np.deg2rad(turn) + 2 * np.pi * np.arange(steps) / steps
    radii = np.where(np.arange(steps) % 2, inner, 1.0)
    return list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True))


def _half_circle(sign: int) -> list[Point]:
    angles = np.linspace(0, np.pi, 16)
    return list(zip(np.cos(angles), -sign * np.sin(angles) + sign * 0.5, strict=True))


def _heart() -> list[Point]:
    t = np.linspace(0, 2 * np.pi, 28, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return list(zip(np.sin(t) ** 3, -y / 16, strict=True))


def _crescent() -> list[Point]:
    outer, inner = np.linspace(0.25 * np.pi, 1.75 * np.pi, 20), np.linspace(1.65 * np.pi, 0.35 * np.pi, 16)
    return [(np.cos(t), np.sin(t)) for t in outer] + [(0.4 + 0.72 * np.cos(t), 0.72 * np.sin(t)) for t in inner]


def _cross() -> list[Point]:
    """A plus sign: one notch, turned by four quarters."""
    notch = np.array([(-0.33, -0.33), (-0.33, -1), (0.33, -1)])
    quarter = np.array([[0, 1], [-1, 0]])
    return [tuple(p) for k in range(4) for p in (notch @ np.linalg.matrix_power(quarter, k)).tolist()]


_OUTLINES: dict[str, list[Point]] = {
    "arrow": [(-1, -0.3), (0.1, -0.3), (0.1, -0.8), (1, 0), (0.1, 0.8), (0.1, 0.3), (-1, 0.3)],
    "circle": regular(24),
    "crescent": _crescent(),
    "cross": _cross(),
    "diamond": [(0, -1), (0.62, 0), (0, 1), (-0.62, 0)],
    "heart": _heart(),
    "hexagon": regular(6),
    "pentagon": regular(5),
    "rectangle": [(-1, -0.5), (1, -0.5), (1, 0.5), (-1, 0.5)],
    "semicircle": _half_circle(1),
    "square": [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)],
    "star": regular(5, inner=0.42),
    "triangle": regular(3),
}


def _outline(c: Canvas, points: list[Point]) -> None:
    c.polygon(points, c.pick(*_COLOURS))


def _ring(c: Canvas) -> None:
    angles = np.linspace(0, 2 * np.pi, 24)
    c.path([(0.75 * np.cos(t), 0.75 * np.sin(t)) for t in angles], c.pick(*_COLOURS), width=0.42)


CONCEPTS: dict[str, Concept] = {name: functools.partial(_outline, points=points) for name, points in _OUTLINES.items()}
CONCEPTS["ring"] = _ring
