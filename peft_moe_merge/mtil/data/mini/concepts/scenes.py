"""Landscapes and rooms by their composition; they fill the whole image."""

import numpy as np

from ..canvas import Canvas, Concept

_EDGE = 1.4


def _halves(c: Canvas, sky: str, ground: str, low: float = -0.2, high: float = 0.3) -> float:
    """Sky over ground; returns the height of the horizon."""
    horizon = c.uniform(low, high)
    c.box(-_EDGE, -_EDGE, _EDGE, horizon, sky)
    c.box(-_EDGE, horizon, _EDGE, _EDGE, ground)
    return horizon


def _tree(c: Canvas, x: float, y: float, size: float) -> None:
    c.box(x - 0.06 * size, y - 0.3 * size, x + 0.06 * size, y, "brown")
    c.polygon(
        [(x - 0.4 * size, y - 0.25 * size), (x + 0.4 * size, y - 0.25 * size), (x, y - 1.2 * size)], "dark green"
    )


def _beach(c: Canvas) -> None:
    horizon = _halves(c, "light blue", "blue", -0.4, 0.0)
    shore = horizon + c.uniform(0.3, 0.5)
    c.polygon([(-_EDGE, shore), (_EDGE, shore + c.uniform(-0.1, 0.35)), (_EDGE, _EDGE), (-_EDGE, _EDGE)], "sand")
    x = c.uniform(-0.6, 0.6)
    c.path([(x, 0.9), (x, 0.35)], "brown", 0.07)
    c.polygon([(x - 0.4, 0.45), (x, 0.15), (x + 0.4, 0.45)], c.pick("red", "yellow", "white"))


def _bridge(c: Canvas) -> None:
    _halves(c, "light blue", "blue", 0.2, 0.4)
    deck = c.uniform(0.0, 0.15)
    paint = c.pick("red", "gray", "dark gray")
    c.box(-_EDGE, deck, _EDGE, deck + 0.12, paint)
    for x in (-0.6, 0.6):
        c.box(x - 0.08, -0.75, x + 0.08, 0.6, paint)
    c.path([(-_EDGE, -0.1), (-0.6, -0.7), (0, -0.1), (0.6, -0.7), (_EDGE, -0.1)], paint, 0.07)


def _castle(c: Canvas) -> None:
    _halves(c, "light blue", "green", 0.4, 0.6)
    c.box(-0.6, -0.2, 0.6, 0.65, "gray")
    for x in (-0.65, 0.65):
        c.box(x - 0.2, -0.5, x + 0.2, 0.65, "light gray")
        c.polygon([(x - 0.26, -0.5), (x + 0.26, -0.5), (x, -0.95)], c.pick("red", "blue"))
    c.box(-0.16, 0.2, 0.16, 0.65, "brown")


def _city(c: Canvas) -> None:
    _halves(c, c.pick("light blue", "light gray"), "dark gray", 0.6, 0.75)
    x = -_EDGE
    while x < _EDGE:
        wide, top = c.uniform(0.28, 0.45), c.uniform(-0.85, 0.0)
        c.box(x, top, x + wide, 0.75, c.pick("gray", "dark gray", "blue", "brown"))
        for y in np.arange(top + 0.12, 0.6, 0.25):
            c.box(x + 0.08, y, x + 0.18, y + 0.1, "yellow")
        x += wide + 0.04


def _desert(c: Canvas) -> None:
    horizon = _halves(c, c.pick("light blue", "cream"), "sand")
    c.polygon([(-_EDGE, horizon), (c.uniform(-0.6, 0.0), horizon - 0.3), (0.5, horizon)], "tan")
    x = c.uniform(-0.5, 0.5)
    c.box(x - 0.1, horizon - 0.3, x + 0.1, 0.8, "green")
    c.path([(x, 0.35), (x + 0.35, 0.35), (x + 0.35, 0.0)], "green", 0.13)
    c.path([(x, 0.5), (x - 0.35, 0.5), (x - 0.35, 0.15)], "green", 0.13)


def _forest(c: Canvas) -> None:
    _halves(c, "light green", "dark green", 0.3, 0.6)
    for _ in range(9):
        _tree(c, c.uniform(-1.1, 1.1), c.uniform(0.5, 1.0), c.uniform(0.8, 1.3))


def _meadow(c: Canvas) -> None:
    horizon = _halves(c, "light blue", "light green")
    c.disc(c.uniform(-0.7, 0.7), -0.7, 0.2, "yellow")
    for _ in range(18):
        c.disc(c.uniform(-1, 1), c.uniform(horizon + 0.15, 1), 0.07, c.pick("red", "yellow", "white", "pink"))


def _mountains(c: Canvas) -> None:
    _halves(c, "light blue", "green", 0.4, 0.6)
    for x in (-0.7, 0.6, c.uniform(-0.2, 0.2)):
        top, wide = c.uniform(-0.9, -0.5), c.uniform(0.6, 0.8)
        c.polygon([(x - wide, 0.6), (x + wide, 0.6), (x, top)], "gray")
        c.polygon([(x - 0.25 * wide, top + 0.3), (x + 0.25 * wide, top + 0.3), (x, top)], "white")


def _night(c: Canvas) -> None:
    horizon = _halves(c, "dark blue", "black", 0.4, 0.7)
    c.disc(c.uniform(-0.6, 0.6), c.uniform(-0.7, -0.3), 0.22, "cream")
    for _ in range(12):
        c.disc(c.uniform(-1, 1), c.uniform(-1, horizon), 0.045, "white")


def _road(c: Canvas) -> None:
    horizon = _halves(c, "light blue", c.pick("green", "tan", "light green"))
    x = c.uniform(-0.3, 0.3)
    c.polygon([(x - 0.06, horizon), (x + 0.06, horizon), (0.9, 1.2), (-0.9, 1.2)], "dark gray")
    for near in (0.15, 0.45, 0.8):
        y = horizon + near * (1.2 - horizon)
        c.box(x * (1 - near) - 0.09 * near, y - 0.16 * near, x * (1 - near) + 0.09 * near, y, "white")


def _room(c: Canvas) -> None:
    _halves(c, c.pick("cream", "light gray", "pink"), "brown", 0.4, 0.6)
    x = c.uniform(-0.5, 0.2)
    c.box(x - 0.3, -0.75, x + 0.4, -0.1, "white")
    c.box(x - 0.22, -0.67, x + 0.32, -0.18, "light blue")
    c.box(-0.9, 0.3, 0.3, 0.75, c.pick("red", "blue", "green"))
    c.box(-0.9, 0.05, -0.72, 0.85, "brown")
    c.path([(0.7, 0.8), (0.7, 0.0)], "dark gray", 0.07)
    c.polygon([(0.5, 0.0), (0.9, 0.0), (0.8, -0.3), (0.6, -0.3)], "yellow")


def _snow(c: Canvas) -> None:
    _halves(c, "light gray", "white")
    for _ in range(3):
        _tree(c, c.uniform(-0.9, 0.9), c.uniform(0.4, 0.8), c.uniform(0.6, 0.9))
    for _ in range(16):
        c.disc(c.uniform(-1, 1), c.uniform(-1, 1), 0.06, "white")


def _sunset(c: Canvas) -> None:
    horizon = _halves(c, "orange", c.pick("dark blue", "purple"), 0.1, 0.4)
    c.box(-_EDGE, -_EDGE, _EDGE, -0.5, "purple")
    c.box(-_EDGE, -0.5, _EDGE, -0.2, "pink")
    angles = np.linspace(np.pi, 2 * np.pi, 14)
    x = c.uniform(-0.4, 0.4)
    c.polygon([(x + 0.4 * np.cos(t), horizon + 0.4 * np.sin(t)) for t in angles], "yellow")


CONCEPTS: dict[str, Concept] = {
    "beach": _beach,
    "bridge": _bridge,
    "castle": _castle,
    "city": _city,
    "desert": _desert,
    "forest": _forest,
    "living room": _room,
    "meadow": _meadow,
    "mountains": _mountains,
    "night sky": _night,
    "road": _road,
    "snow": _snow,
    "sunset": _sunset,
}
