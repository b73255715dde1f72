"""Faces of animals: a head, ears, a muzzle and eyes, put together differently."""

import numpy as np

from ..canvas import Canvas, Concept


def _eyes(c: Canvas, gap: float = 0.3, y: float = -0.1, radius: float = 0.1, ring: str | None = None) -> None:
    for x in (-gap, gap):
        if ring:
            c.disc(x, y, 1.9 * radius, ring)
        c.disc(x, y, radius, "black")


def _round_ears(c: Canvas, colour: str, inside: str, x: float = 0.65, y: float = -0.6, radius: float = 0.32) -> None:
    for side in (-x, x):
        c.disc(side, y, radius, colour)
        c.disc(side, y, 0.55 * radius, inside)


def _pointed_ears(c: Canvas, colour: str, height: float) -> None:
    for s in (-1, 1):
        c.polygon([(0.75 * s, -height), (0.12 * s, -0.55), (0.75 * s, -0.1)], colour)


def _bear(c: Canvas) -> None:
    _round_ears(c, "brown", "tan")
    c.disc(0, 0.1, 0.82, "brown")
    c.disc(0, 0.42, 0.36, "tan", 0.28)
    c.disc(0, 0.32, 0.13, "black", 0.09)
    _eyes(c, 0.32, -0.1, 0.08)


def _cat(c: Canvas) -> None:
    fur = c.pick("gray", "orange", "tan")
    _pointed_ears(c, fur, 1.0)
    c.disc(0, 0.12, 0.78, fur, 0.68)
    _eyes(c, 0.32, 0.0, 0.11, "yellow")
    c.polygon([(-0.1, 0.28), (0.1, 0.28), (0, 0.4)], "pink")
    for s in (-1, 1):
        for y in (0.3, 0.5):
            c.path([(0.2 * s, 0.4), (0.95 * s, y)], "white", 0.04)


def _cow(c: Canvas) -> None:
    for s in (-1, 1):
        c.polygon([(0.4 * s, -0.6), (0.75 * s, -1.0), (0.6 * s, -0.5)], "cream")
        c.disc(0.75 * s, -0.4, 0.25, "black", 0.13, 15 * s)
    c.polygon([(-0.55, -0.65), (0.55, -0.65), (0.45, 0.8), (-0.45, 0.8)], "white")
    c.polygon([(0.05, -0.65), (0.55, -0.65), (0.5, 0.1), (0.15, 0.0)], "black")
    c.disc(0, 0.65, 0.52, "pink", 0.3)
    for x in (-0.2, 0.2):
        c.disc(x, 0.65, 0.07, "brown")
    _eyes(c, 0.3, -0.2, 0.08, "white")


def _dog(c: Canvas) -> None:
    fur = c.pick("tan", "brown", "cream")
    c.disc(0, 0.0, 0.68, fur, 0.78)
    for s in (-1, 1):
        c.disc(0.72 * s, 0.05, 0.22, "dark gray", 0.55, -12 * s)
    c.disc(0, 0.42, 0.38, "white", 0.34)
    c.disc(0, 0.22, 0.17, "black", 0.12)
    c.disc(0, 0.78, 0.13, "red", 0.2)
    _eyes(c, 0.28, -0.2, 0.09)


def _fox(c: Canvas) -> None:
    _pointed_ears(c, "orange", 1.0)
    c.polygon([(-0.95, -0.05), (0, -0.6), (0.95, -0.05), (0, 0.95)], "orange")
    for s in (-1, 1):
        c.polygon([(0.95 * s, -0.05), (0.35 * s, 0.05), (0, 0.95)], "white")
    c.disc(0, 0.85, 0.12, "black")
    _eyes(c, 0.35, -0.08, 0.08)


def _frog(c: Canvas) -> None:
    c.disc(0, 0.2, 0.92, "green", 0.62)
    for x in (-0.5, 0.5):
        c.disc(x, -0.45, 0.3, "green")
        c.disc(x, -0.48, 0.18, "white")
        c.disc(x, -0.48, 0.09, "black")
    c.path([(-0.6, 0.3), (-0.25, 0.48), (0.25, 0.48), (0.6, 0.3)], "dark green", 0.08)


def _mouse(c: Canvas) -> None:
    _round_ears(c, "light gray", "pink", 0.58, -0.45, 0.44)
    c.polygon([(-0.6, -0.1), (-0.3, -0.45), (0.3, -0.45), (0.6, -0.1), (0.12, 0.88), (-0.12, 0.88)], "light gray")
    c.disc(0, 0.85, 0.13, "pink")
    _eyes(c, 0.25, 0.05, 0.08)


def _owl(c: Canvas) -> None:
    for s in (-1, 1):
        c.polygon([(0.8 * s, -1.0), (0.15 * s, -0.6), (0.75 * s, -0.3)], "brown")
    c.disc(0, 0.05, 0.82, "brown", 0.9)
    for x in (-0.35, 0.35):
        c.disc(x, -0.15, 0.36, "cream")
        c.disc(x, -0.15, 0.22, "yellow")
        c.disc(x, -0.15, 0.12, "black")
    c.polygon([(-0.12, 0.08), (0.12, 0.08), (0, 0.4)], "orange")


def _panda(c: Canvas) -> None:
    _round_ears(c, "black", "black")
    c.disc(0, 0.1, 0.84, "white", 0.76)
    for s in (-1, 1):
        c.disc(0.35 * s, -0.02, 0.17, "black", 0.25, 30 * s)
        c.disc(0.33 * s, -0.04, 0.07, "white")
    c.disc(0, 0.35, 0.13, "black", 0.09)


def _pig(c: Canvas) -> None:
    for s in (-1, 1):
        c.polygon([(0.85 * s, -0.85), (0.2 * s, -0.65), (0.75 * s, -0.25)], "pink")
    c.disc(0, 0.08, 0.85, "pink", 0.78)
    c.disc(0, 0.3, 0.36, "skin", 0.26)
    for x in (-0.13, 0.13):
        c.disc(x, 0.3, 0.07, "brown")
    _eyes(c, 0.38, -0.18, 0.08)


def _rabbit(c: Canvas) -> None:
    fur = c.pick("white", "light gray", "tan")
    for s in (-1, 1):
        c.disc(0.28 * s, -0.6, 0.17, fur, 0.48, 8 * s)
        c.disc(0.28 * s, -0.6, 0.08, "pink", 0.34, 8 * s)
    c.disc(0, 0.35, 0.6, fur, 0.56)
    c.polygon([(-0.08, 0.42), (0.08, 0.42), (0, 0.52)], "pink")
    c.box(-0.1, 0.65, 0.1, 0.85, "white")
    _eyes(c, 0.25, 0.2, 0.08)


def _sheep(c: Canvas) -> None:
    for angle in np.linspace(0, 2 * np.pi, 9, endpoint=False):
        c.disc(0.6 * np.cos(angle), -0.05 + 0.58 * np.sin(angle), 0.33, "cream")
    for s in (-1, 1):
        c.disc(0.6 * s, 0.05, 0.25, "dark gray", 0.12, 20 * s)
    c.disc(0, 0.2, 0.42, "dark gray", 0.58)
    for x in (-0.18, 0.18):
        c.disc(x, 0.05, 0.1, "white")
        c.disc(x, 0.05, 0.05, "black")


CONCEPTS: dict[str, Concept] = {
    "bear": _bear,
    "cat": _cat,
    "cow": _cow,
    "dog": _dog,
    "fox": _fox,
    "frog": _frog,
    "mouse": _mouse,
    "owl": _owl,
    "panda": _panda,
    "pig": _pig,
    "rabbit": _rabbit,
    "sheep": _sheep,
}
