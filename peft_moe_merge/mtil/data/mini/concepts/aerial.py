"""Land cover from above; it fills the whole image (and reaches beyond the square, so that it can be turned)."""

import numpy as np

from ..canvas import Canvas, Concept

_EDGE = 1.7


def _ground(c: Canvas, colour: str) -> None:
    c.box(-_EDGE, -_EDGE, _EDGE, _EDGE, colour)


def _winding(c: Canvas, bend: float) -> list[tuple[float, float]]:
    xs = np.linspace(-_EDGE, _EDGE, 12)
    phase, drift = c.uniform(0, 2 * np.pi), c.uniform(-0.2, 0.2)
    return [(x, drift * x + bend * np.sin(2 * x + phase)) for x in xs]


def _fields(c: Canvas) -> None:
    for x in np.arange(-_EDGE, _EDGE, 0.75):
        for y in np.arange(-_EDGE, _EDGE, 0.75):
            crop, furrow = c.pick("light green", "green", "sand", "tan", "yellow"), c.pick("brown", "dark green")
            c.box(x, y, x + 0.7, y + 0.7, crop)
            along = c.rng.random() < 0.5
            for t in (0.15, 0.35, 0.55):
                c.path([(x, y + t), (x + 0.7, y + t)] if along else [(x + t, y), (x + t, y + 0.7)], furrow, 0.06)


def _forest(c: Canvas) -> None:
    _ground(c, "dark green")
    for _ in range(60):
        x, y = c.rng.uniform(-1.4, 1.4, 2)
        c.disc(x, y, c.uniform(0.1, 0.2), c.pick("green", "dark green"))


def _pasture(c: Canvas) -> None:
    _ground(c, "light green")
    for _ in range(c.rng.integers(1, 4)):
        x, y = c.rng.uniform(-1, 1, 2)
        c.disc(x, y, c.uniform(0.3, 0.6), "green", c.uniform(0.2, 0.5), c.uniform(0, 180))
    for _ in range(c.rng.integers(3, 9)):
        x, y = c.rng.uniform(-1, 1, 2)
        c.disc(x, y, 0.05, "white")


def _highway(c: Canvas) -> None:
    _ground(c, c.pick("light green", "tan", "green"))
    road = _winding(c, 0.12)
    c.path(road, "dark gray", c.uniform(0.38, 0.5))
    for a, b in zip(road[::2], road[1::2], strict=True):
        c.path([a, b], "white", 0.06)


def _river(c: Canvas) -> None:
    _ground(c, c.pick("green", "light green", "tan"))
    c.path(_winding(c, c.uniform(0.3, 0.5)), "blue", c.uniform(0.3, 0.5))


def _lake(c: Canvas) -> None:
    _ground(c, c.pick("green", "light green", "dark green"))
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    radii = c.rng.uniform(0.55, 1.0, 12)
    c.polygon(list(zip(radii * np.cos(angles), radii * np.sin(angles), strict=True)), "blue")


def _houses(c: Canvas) -> None:
    _ground(c, c.pick("light green", "light gray"))
    for t in (-0.75, 0.75):
        c.path([(-_EDGE, t), (_EDGE, t)], "gray", 0.16)
    for x in np.arange(-1.5, 1.5, 0.5):
        for y in (-1.35, -0.95, -0.55, -0.15, 0.2, 0.55, 0.95, 1.35):
            if c.rng.random() < 0.8:
                c.box(x, y - 0.12, x + c.uniform(0.22, 0.32), y + 0.12, c.pick("red", "brown", "orange"))


def _factory(c: Canvas) -> None:
    _ground(c, "gray")
    for x, y in ((-0.8, -0.8), (0.35, -0.7), (-0.6, 0.4), (0.6, 0.5)):
        wide, high = c.uniform(0.35, 0.55), c.uniform(0.25, 0.5)
        c.box(x - wide, y - high, x + wide, y + high, c.pick("white", "light gray", "light blue"))
        c.path([(x - wide, y), (x + wide, y)], "dark gray", 0.07)


def _orchard(c: Canvas) -> None:
    _ground(c, c.pick("tan", "sand"))
    step = c.uniform(0.38, 0.48)
    for x in np.arange(-1.5, 1.5, step):
        for y in np.arange(-1.5, 1.5, step):
            c.disc(x, y, 0.33 * step, c.pick("green", "dark green"))


def _desert(c: Canvas) -> None:
    _ground(c, "sand")
    for y in np.arange(-1.4, 1.5, c.uniform(0.38, 0.55)):
        phase = c.uniform(0, 2 * np.pi)
        c.path([(x, y + 0.1 * np.sin(3 * x + phase)) for x in np.linspace(-_EDGE, _EDGE, 14)], "tan", 0.12)


def _airport(c: Canvas) -> None:
    _ground(c, c.pick("light green", "sand"))
    c.box(-_EDGE, -0.25, _EDGE, 0.25, "dark gray")
    for x in np.arange(-1.5, 1.5, 0.4):
        c.box(x, -0.05, x + 0.2, 0.05, "white")
    c.path([(-0.5, 0.2), (0.4, 0.95), (_EDGE, 0.95)], "gray", 0.2)
    for x in (-0.6, 0.3):
        c.box(x, -0.95, x + 0.6, -0.6, "white")


def _sea(c: Canvas) -> None:
    _ground(c, "dark blue")
    for _ in range(16):
        x, y = c.rng.uniform(-1.4, 1.4, 2)
        c.path([(x, y), (x + 0.2, y - 0.05), (x + 0.4, y)], "blue", 0.08)


CONCEPTS: dict[str, Concept] = {
    "airport": _airport,
    "crop fields": _fields,
    "desert": _desert,
    "factory": _factory,
    "forest": _forest,
    "highway": _highway,
    "houses": _houses,
    "lake": _lake,
    "orchard": _orchard,
    "pasture": _pasture,
    "river": _river,
    "sea": _sea,
}
