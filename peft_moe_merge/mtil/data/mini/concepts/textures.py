"""Two-coloured patterns that fill the whole image (they reach beyond the square, so that they can be turned)."""

import numpy as np

from ..canvas import Canvas, Concept
from .shapes import regular

_DARK = ("black", "dark blue", "brown", "dark green", "purple", "red", "dark gray", "blue")
_PALE = ("white", "cream", "light blue", "yellow", "light gray", "pink", "light green", "sand")
_EDGE = 1.7


def _start(c: Canvas) -> tuple[str, str]:
    """Fills the image with one colour; returns it and the one for the pattern."""
    first, second = c.pick(*_DARK), c.pick(*_PALE)
    if c.rng.random() < 0.5:
        first, second = second, first
    c.box(-_EDGE, -_EDGE, _EDGE, _EDGE, first)
    return first, second


def _grid_points(c: Canvas, step: float) -> list[tuple[int, int, float, float]]:
    phase = c.rng.uniform(0, step, 2)
    count = int(2 * _EDGE / step) + 2
    return [
        (i, j, -_EDGE - step + phase[0] + step * i, -_EDGE - step + phase[1] + step * j)
        for j in range(count)
        for i in range(count)
    ]


def _rows(c: Canvas, step: float) -> np.ndarray:
    return np.arange(-_EDGE - c.uniform(0, step), _EDGE + step, step)


def _striped(c: Canvas) -> None:
    _, ink = _start(c)
    step = c.uniform(0.4, 0.6)
    for y in _rows(c, step):
        c.box(-_EDGE, y, _EDGE, y + step / 2, ink)


def _checkered(c: Canvas) -> None:
    _, ink = _start(c)
    step = c.uniform(0.36, 0.52)
    for i, j, x, y in _grid_points(c, step):
        if (i + j) % 2:
            c.box(x, y, x + step, y + step, ink)


def _dotted(c: Canvas) -> None:
    _, ink = _start(c)
    step = c.uniform(0.48, 0.62)
    for _, _, x, y in _grid_points(c, step):
        c.disc(x, y, 0.3 * step, ink)


def _grid(c: Canvas) -> None:
    _, ink = _start(c)
    step = c.uniform(0.42, 0.6)
    for t in _rows(c, step):
        c.path([(-_EDGE, t), (_EDGE, t)], ink, 0.1)
        c.path([(t, -_EDGE), (t, _EDGE)], ink, 0.1)


def _zigzag(c: Canvas) -> None:
    _, ink = _start(c)
    step, teeth = c.uniform(0.45, 0.6), c.uniform(0.22, 0.3)
    xs = np.arange(-_EDGE, _EDGE + teeth, teeth)
    for y in _rows(c, step):
        c.path([(x, y + teeth * (k % 2)) for k, x in enumerate(xs)], ink, 0.17)


def _wavy(c: Canvas) -> None:
    _, ink = _start(c)
    step, length = c.uniform(0.42, 0.55), c.uniform(0.9, 1.3)
    xs = np.linspace(-_EDGE, _EDGE, 36)
    for y in _rows(c, step):
        c.path([(x, y + 0.17 * np.sin(2 * np.pi * x / length)) for x in xs], ink, 0.17)


def _bricks(c: Canvas) -> None:
    _, ink = _start(c)
    high = c.uniform(0.34, 0.46)
    wide = 2 * high
    for row, y in enumerate(_rows(c, high)):
        for x in np.arange(-_EDGE - wide, _EDGE + wide, wide):
            left = x + wide / 2 * (row % 2)
            c.box(left, y, left + wide - 0.08, y + high - 0.08, ink)


def _honeycomb(c: Canvas) -> None:
    _, ink = _start(c)
    radius = c.uniform(0.3, 0.38)
    cell = 0.86 * radius * np.array(regular(6))
    for row, y in enumerate(np.arange(-_EDGE, _EDGE + radius, 1.5 * radius)):
        for x in np.arange(-_EDGE, _EDGE + radius, np.sqrt(3) * radius):
            c.polygon(cell + np.array([x + np.sqrt(3) / 2 * radius * (row % 2), y]), ink)


def _scaly(c: Canvas) -> None:
    ground, ink = _start(c)
    radius = c.uniform(0.3, 0.4)
    for row, y in enumerate(np.arange(_EDGE, -_EDGE - radius, -radius / 1.3)):
        for x in np.arange(-_EDGE - radius, _EDGE + 2 * radius, 2 * radius):
            c.disc(x + radius * (row % 2), y, radius, ground)
            c.disc(x + radius * (row % 2), y, 0.78 * radius, ink)


def _spiral(c: Canvas) -> None:
    _, ink = _start(c)
    turns = np.linspace(0, 5 * 2 * np.pi, 90)
    radii = c.uniform(0.05, 0.065) * turns
    phase = c.uniform(0, 2 * np.pi)
    c.path(list(zip(radii * np.cos(turns + phase), radii * np.sin(turns + phase), strict=True)), ink, 0.15)


def _ringed(c: Canvas) -> None:
    first, second = _start(c)
    x, y = c.rng.uniform(-0.3, 0.3, 2)
    step = c.uniform(0.2, 0.27)
    for k in range(9, 0, -1):
        c.disc(x, y, step * k, second if k % 2 else first)


def _cracked(c: Canvas) -> None:
    _, ink = _start(c)
    for _ in range(7):
        point, heading = c.rng.uniform(-1, 1, 2), c.uniform(0, 2 * np.pi)
        points = [tuple(point)]
        for _ in range(6):
            heading += c.uniform(-0.8, 0.8)
            point = point + 0.3 * np.array([np.cos(heading), np.sin(heading)])
            points.append(tuple(point))
        c.path(points, ink, 0.07)


def _starry(c: Canvas) -> None:
    _, ink = _start(c)
    for _ in range(11):
        x, y = c.rng.uniform(-1.2, 1.2, 2)
        c.polygon(c.uniform(0.16, 0.28) * np.array(regular(5, inner=0.4, turn=c.uniform(0, 72))) + (x, y), ink)


CONCEPTS: dict[str, Concept] = {
    "checkered": _checkered,
    "cracked": _cracked,
    "dotted": _dotted,
    "grid": _grid,
    "honeycomb": _honeycomb,
    "brick": _bricks,
    "ringed": _ringed,
    "scaly": _scaly,
    "spiral": _spiral,
    "starry": _starry,
    "striped": _striped,
    "wavy": _wavy,
    "zigzag": _zigzag,
}
