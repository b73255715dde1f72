"""Vehicles by their silhouette, seen from the side."""

import numpy as np

from ..canvas import Canvas, Concept

_PAINTS = ("red", "blue", "white", "green", "yellow", "orange", "gray")


def _wheels(c: Canvas, *xs: float, y: float = 0.5, radius: float = 0.22) -> None:
    for x in xs:
        c.disc(x, y, radius, "black")
        c.disc(x, y, 0.45 * radius, "light gray")


def _airplane(c: Canvas) -> None:
    paint = c.pick("white", "light gray", "blue")
    c.polygon([(-0.95, -0.55), (-0.7, -0.55), (-0.45, -0.1), (-0.85, -0.1)], paint)
    c.disc(0, 0, 0.98, paint, 0.2)
    c.polygon([(-0.15, 0.05), (0.25, 0.05), (-0.35, 0.65), (-0.55, 0.65)], "gray")
    for x in (-0.3, 0.0, 0.3, 0.6):
        c.disc(x, -0.05, 0.06, "dark blue")


def _balloon(c: Canvas) -> None:
    c.path([(-0.3, 0.3), (-0.15, 0.75)], "brown", 0.05)
    c.path([(0.3, 0.3), (0.15, 0.75)], "brown", 0.05)
    c.disc(0, -0.25, 0.68, c.pick(*_PAINTS), 0.7)
    c.disc(0, -0.25, 0.28, c.pick(*_PAINTS), 0.7)
    c.box(-0.18, 0.7, 0.18, 1.0, "brown")


def _bicycle(c: Canvas) -> None:
    frame = c.pick("red", "blue", "black", "green")
    for x in (-0.58, 0.58):
        angles = np.linspace(0, 2 * np.pi, 20)
        c.path([(x + 0.38 * np.cos(t), 0.4 + 0.38 * np.sin(t)) for t in angles], "black", 0.08)
    c.path([(-0.58, 0.4), (-0.25, -0.2), (0.4, -0.2), (0.0, 0.4), (-0.58, 0.4)], frame, 0.1)
    c.path([(0.0, 0.4), (-0.3, -0.4)], frame, 0.1)
    c.path([(0.58, 0.4), (0.35, -0.45), (0.6, -0.5)], frame, 0.1)
    c.path([(-0.45, -0.42), (-0.15, -0.42)], "black", 0.12)


def _bus(c: Canvas) -> None:
    c.box(-0.98, -0.5, 0.98, 0.5, c.pick(*_PAINTS))
    for x in (-0.85, -0.4, 0.05, 0.5):
        c.box(x, -0.35, x + 0.34, 0.0, "light blue")
    _wheels(c, -0.6, 0.6)


def _car(c: Canvas) -> None:
    paint = c.pick(*_PAINTS)
    c.polygon([(-0.55, 0.05), (-0.32, -0.4), (0.3, -0.4), (0.6, 0.05)], paint)
    c.polygon([(-0.4, 0.02), (-0.25, -0.3), (0.22, -0.3), (0.42, 0.02)], "light blue")
    c.polygon([(-0.98, 0.05), (0.9, 0.02), (0.98, 0.45), (-0.98, 0.45)], paint)
    _wheels(c, -0.55, 0.55, y=0.45)


def _helicopter(c: Canvas) -> None:
    paint = c.pick(*_PAINTS)
    c.polygon([(-0.2, -0.15), (-1.0, -0.2), (-1.0, -0.05), (-0.2, 0.2)], paint)
    c.path([(-1.0, -0.4), (-0.95, 0.15)], "dark gray", 0.07)
    c.disc(0.25, 0.05, 0.55, paint, 0.38)
    c.disc(0.5, 0.0, 0.22, "light blue", 0.2)
    c.path([(0.2, -0.35), (0.2, -0.55)], "dark gray", 0.08)
    c.path([(-0.7, -0.58), (1.0, -0.58)], "dark gray", 0.08)
    c.path([(-0.2, 0.65), (0.75, 0.65)], "dark gray", 0.08)


def _rocket(c: Canvas) -> None:
    for s in (-1, 1):
        c.polygon([(0.25 * s, 0.2), (0.6 * s, 0.75), (0.25 * s, 0.6)], "red")
    c.polygon([(-0.15, 0.6), (0.15, 0.6), (0, 1.0)], "orange")
    c.polygon([(-0.3, 0.6), (-0.3, -0.4), (0, -1.0), (0.3, -0.4), (0.3, 0.6)], c.pick("white", "light gray"))
    c.disc(0, -0.25, 0.15, "blue")


def _sailboat(c: Canvas) -> None:
    c.path([(0, 0.5), (0, -0.95)], "brown", 0.07)
    sail = c.pick("white", "cream", "red")
    c.polygon([(0.08, -0.9), (0.08, 0.3), (0.8, 0.3)], sail)
    c.polygon([(-0.08, -0.7), (-0.08, 0.3), (-0.6, 0.3)], sail)
    c.polygon([(-0.85, 0.45), (0.9, 0.45), (0.6, 0.85), (-0.6, 0.85)], c.pick("brown", "blue", "white"))


def _ship(c: Canvas) -> None:
    c.box(-0.5, -0.2, 0.55, 0.2, "white")
    c.box(-0.15, -0.65, 0.12, -0.2, "red")
    c.box(0.25, -0.5, 0.45, -0.2, "red")
    c.polygon([(-1.0, 0.2), (1.0, 0.2), (0.75, 0.7), (-0.8, 0.7)], c.pick("dark blue", "black", "dark gray"))


def _tractor(c: Canvas) -> None:
    paint = c.pick("green", "red", "blue")
    c.box(-0.1, -0.15, 0.85, 0.35, paint)
    c.box(-0.65, -0.75, 0.0, 0.3, paint)
    c.box(-0.52, -0.62, -0.1, -0.15, "light blue")
    c.path([(0.55, -0.15), (0.55, -0.6)], "black", 0.1)
    _wheels(c, -0.45, y=0.4, radius=0.48)
    _wheels(c, 0.65, y=0.6, radius=0.27)


def _train(c: Canvas) -> None:
    paint = c.pick("red", "green", "blue", "black")
    c.box(-0.95, -0.75, -0.35, 0.4, paint)
    c.box(-0.82, -0.58, -0.48, -0.15, "light blue")
    c.box(-0.35, -0.25, 0.85, 0.4, paint)
    c.polygon([(0.4, -0.8), (0.75, -0.8), (0.68, -0.25), (0.48, -0.25)], "dark gray")
    c.disc(0.6, -0.95, 0.15, "white")
    _wheels(c, -0.65, -0.1, 0.3, 0.68, y=0.55, radius=0.18)


def _truck(c: Canvas) -> None:
    c.box(-1.0, -0.65, 0.3, 0.4, c.pick("white", "cream", "light gray"))
    c.polygon([(0.35, -0.35), (0.75, -0.35), (0.98, 0.0), (0.98, 0.4), (0.35, 0.4)], c.pick(*_PAINTS))
    c.polygon([(0.45, -0.25), (0.7, -0.25), (0.85, 0.02), (0.45, 0.02)], "light blue")
    _wheels(c, -0.65, -0.2, 0.65, y=0.45)


CONCEPTS: dict[str, Concept] = {
    "airplane": _airplane,
    "bicycle": _bicycle,
    "bus": _bus,
    "car": _car,
    "helicopter": _helicopter,
    "hot air balloon": _balloon,
    "rocket": _rocket,
    "sailboat": _sailboat,
    "ship": _ship,
    "tractor": _tractor,
    "train": _train,
    "truck": _truck,
}
